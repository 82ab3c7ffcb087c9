"""How much memory a run took and how much there is: of the card where it has one, else of the process."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
# Writing 5 there sets the peak of the resident memory to what is resident now (Linux).
_RESET, _PEAK = Path("/proc/self/clear_refs"), "5"


def reset_peak(device: torch.device) -> None:
    """Begin to measure anew: a process may have had a larger job before.

    On a card from what tensors hold now: blocks that are free again, as loading leaves them behind, go back first.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _RESET.write_text(_PEAK)


def limit_memory(device: torch.device, most_bytes: int | None) -> None:
    """Let this process take at most `most_bytes` of the card, None: all of it. More is an out-of-memory error."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (most_bytes or total) / total), device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory held at once, in bytes: reserved on the card, or resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken, in bytes: of the card, or of the machine and its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    machine = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    return min(machine, _group_free_bytes() or machine)


def is_fault_of_device(error: Exception) -> bool:
    """Return whether `error`, of reading weights, is about the memory or the device that they were read into."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "CUDA" in str(error)


def _group_free_bytes() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        lines = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as used, and give way.
        cached = next((int(count) for name, count in lines if name == "file"), 0)
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + cached)
