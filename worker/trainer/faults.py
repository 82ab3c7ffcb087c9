"""Every way in which the child ends, as exit code and message: the only place that knows both."""

from __future__ import annotations

import errno
import sys
from dataclasses import asdict

from common.errors import BadRows, TuneryError, UserError
from worker.ml.checkpoint import BadCheckpoint
from worker.trainer.protocol import (
    BAD_CHECKPOINT,
    BAD_INPUT,
    DEVICE_FAULT,
    DISK_FULL,
    DIVERGED,
    DRAINED,
    OUT_OF_MEMORY,
    Failed,
)

CRASHED = 1

_FULL = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122")
# torch's zip writer gives no reason when a write comes back short.
_SHORT_WRITE = ("PytorchStreamWriter failed writing", "unexpected pos")
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")
_DEVICE = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NVML", "NCCL error", "AcceleratorError")


class Diverged(TuneryError):
    """The loss is not a number any more, or has exploded."""

    code = "diverged"


class Drained(Exception):
    """The run stops before its end because it was asked to; what it can be resumed from is on disk."""


def diverged(what: str) -> Diverged:
    """Return the error that training went out of bounds."""
    return Diverged(
        f"training diverged: {what}",
        param="hyperparameters.learning_rate",
        hint="lower learning_rate, or set max_grad_norm; the last good checkpoint is kept",
    )


def classify(error: BaseException) -> tuple[int, Failed | None]:
    """Return the exit code for `error`, and what to tell the supervisor; None for a drain, which is no failure."""
    if isinstance(error, Drained):
        return DRAINED, None
    if isinstance(error, BadRows):
        problems = [asdict(problem) for problem in error.problems]
        return BAD_INPUT, Failed(error.code, error.message, error.hint, error.param, problems, error.num_problems)
    if isinstance(error, UserError):
        return BAD_INPUT, Failed(error.code, error.message, error.hint, error.param)
    if isinstance(error, Diverged):
        return DIVERGED, Failed(error.code, error.message, error.hint, error.param)
    if isinstance(error, BadCheckpoint):
        return BAD_CHECKPOINT, Failed(error.code, error.message, error.hint, error.param)
    if isinstance(error, TuneryError):
        return CRASHED, Failed(error.code, error.message, error.hint, error.param)
    text = f"{type(error).__name__}: {error}"
    if _is_disk_full(error, text):
        return DISK_FULL, Failed("disk_full", f"the worker's disk is full: {text}", "free some space on the worker")
    if _is_out_of_memory(error, text):
        return OUT_OF_MEMORY, Failed("out_of_memory", f"out of memory: {_first_line(text)}", "use a smaller batch")
    if _is_device_fault(text):
        return DEVICE_FAULT, Failed("device_fault", f"the accelerator failed: {_first_line(text)}")
    return CRASHED, Failed("trainer_crashed", f"the trainer failed: {_first_line(text)}")


def _is_disk_full(error: BaseException, text: str) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in text for words in _FULL) or any(words in text for words in _SHORT_WRITE)


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def _is_device_fault(text: str) -> bool:
    return any(words in text for words in _DEVICE)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:500]
