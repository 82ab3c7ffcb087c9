"""Which GPUs this machine shows, without importing torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
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


def query_visible(fields: str) -> list[str]:
    """Return what nvidia-smi says of each card that CUDA_VISIBLE_DEVICES leaves, in its order; [] where it fails."""
    chosen = visible_cards()
    # nvidia-smi does not heed CUDA_VISIBLE_DEVICES by itself.
    return [] if chosen == [] else query(fields, chosen or ()) or []


def free_bytes(device: str) -> int | None:
    """Return the free memory of the card `cuda:N`, or None where the driver does not say."""
    lines, index = query_visible("memory.free"), int(device.partition(":")[2] or 0)
    # Parts of a card, and cards that share the machine's memory, have no number there.
    return int(lines[index]) * 2**20 if index < len(lines) and lines[index].isdecimal() else None


def query(fields: str, chosen: Sequence[str] = ()) -> list[str] | None:
    """Return what nvidia-smi says of each card, or of those chosen, a line each; None where it is not or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    command += ["--id", ",".join(chosen)] if chosen else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else None
