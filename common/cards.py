"""Which GPUs this machine shows, without importing torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from common.settings import visible_cards

_TIMEOUT_S = 20


def cards() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES would name, one by one: its own entries, otherwise every card there is."""
    chosen = visible_cards()
    if chosen is not None:
        # CUDA stops at the first entry that is none, and -1 is the usual way to say "no card".
        return chosen[: chosen.index("-1")] if "-1" in chosen else chosen
    listed = query("index")
    if listed is None:
        return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return listed


def query(fields: str) -> list[str] | None:
    """Return what nvidia-smi says of each card, a line each; None where there is no nvidia-smi or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else None
