"""How much memory a run took: of the card where it has one, else of the process."""

from __future__ import annotations

import resource

import torch


def reset_peak(device: torch.device) -> None:
    """Begin to measure anew. The peak of a process on the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held at once, in bytes: reserved on the card, or resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
