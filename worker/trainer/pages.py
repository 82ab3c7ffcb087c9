"""Gives the pages of an optimizer's state back, so that a process which trained with one can take another run.

bitsandbytes 0.50 takes the state of its paged optimizers, of tensors with 100,000 elements or more, by
cudaMallocManaged, hands it out as tensors that do not own it, and has no function that frees it. A list of its own
keeps every such tensor for as long as the process lives. The driver frees what its runtime has allocated.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import torch
from bitsandbytes.functional import GlobalPageManager
from torch.multiprocessing.reductions import StorageWeakRef


def free_pages(free: Callable[[int, int], None] | None = None) -> int:
    """Free every page, once the run that made them is gone, and return how many there were.

    Args:
        free: frees the memory at an address, of the device with this index; the driver's way by default.

    Raises:
        RuntimeError: a page is still in use, so that none was freed, or the driver has refused.
    """
    manager = GlobalPageManager.get_instance()
    # Each has an allocation of its own, and begins where that does.
    pages = {tensor.data_ptr(): tensor.page_deviceid for tensor in manager.paged_tensors}
    # Of the storages: a view keeps the memory in use as well.
    used = [StorageWeakRef(tensor.untyped_storage()) for tensor in manager.paged_tensors]
    manager.initialize()
    gc.collect()
    kept = sum(not reference.expired() for reference in used)
    if kept:
        raise RuntimeError(f"{kept} of {len(used)} pages of optimizer state are still in use")
    for address, device in pages.items():
        (free or _free_managed)(address, device)
    return len(pages)


def _free_managed(address: int, device: int) -> None:
    # The driver takes the context of this thread, which the runtime sets when it is asked for something.
    torch.cuda.synchronize(device)
    release = ctypes.CDLL("libcuda.so.1").cuMemFree_v2
    release.argtypes, release.restype = [ctypes.c_uint64], ctypes.c_int
    if code := release(address):
        raise RuntimeError(f"the driver did not free a page of optimizer state: CUresult {code}")
