"""Runs of the trainer on the card, in this process."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.worker.trainer import tiny

if TYPE_CHECKING:
    from tests.worker.trainer.conftest import Attempt

_JOB = ("method", "lora", "quantization", "shrink", "seed", "export")


def give_back() -> None:
    """Free what earlier runs in this process left to the garbage collector, and lift their limits of memory."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def run(
    folder: Path,
    base: Path,
    rows: list[dict[str, Any]] | None = None,
    *,
    checkpoint: Path | None = None,
    keep: bool = False,
    **options: Any,
) -> Attempt:
    """Lay out a job for the card and run it; `options` are hyperparameters by name, or other fields of the job.

    Args:
        keep: leave the run's model and trainer in memory, where a test looks at them; otherwise the card is empty
            afterwards.
    """
    from tests.worker.trainer.conftest import attempt

    give_back()
    folder.mkdir()
    job = {name: options.pop(name) for name in _JOB if name in options}
    if checkpoint is not None:
        shutil.copytree(checkpoint, folder / "resume")
        job["resume_from"] = "resume"
    tiny.write_run(folder, base, rows, hyperparameters=options, **job)
    spec = json.loads((folder / "spec.json").read_text()) | {"device": "cuda:0"}
    (folder / "spec.json").write_text(json.dumps(spec))
    try:
        made = attempt(folder)
        if not keep:
            made.run = None
        return made
    finally:
        give_back()
