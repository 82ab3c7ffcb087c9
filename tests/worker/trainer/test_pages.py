"""Pages of optimizer state are freed once, and only when nothing refers to them.

On a CPU bitsandbytes makes no pages. Its own list of them is used here as it is, with memory that the system's
allocator gives and takes; that the driver frees what bitsandbytes took is a test of `tests/gpu`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.functional import GlobalPageManager

from worker.trainer.pages import free_pages

LIBC = ctypes.CDLL(None)
LIBC.malloc.argtypes, LIBC.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
LIBC.free.argtypes, LIBC.free.restype = [ctypes.c_void_p], None
SIZE = 100_000


class Heap:
    """Makes pages as `bitsandbytes.functional.get_paged` does, and remembers which were freed."""

    def __init__(self) -> None:
        self.freed: list[tuple[int, int]] = []

    def page(self, device: int = 0) -> torch.Tensor:
        memory = (ctypes.c_uint8 * SIZE).from_address(LIBC.malloc(SIZE))
        page = torch.frombuffer(memory, dtype=torch.uint8).view(SIZE // 10, 10)
        page.is_paged, page.page_deviceid = True, device  # type: ignore[attr-defined]
        GlobalPageManager.get_instance().paged_tensors.append(page)
        return page

    def free(self, address: int, device: int) -> None:
        LIBC.free(address)
        self.freed.append((address, device))


@pytest.fixture
def heap() -> Iterator[Heap]:
    assert not GlobalPageManager.get_instance().paged_tensors
    yield Heap()
    GlobalPageManager.get_instance().initialize()


def test_each_page_is_freed_once_on_its_device(heap: Heap):
    pages = [heap.page(), heap.page(1)]
    # A page may be in the list twice, and in a circle of objects, as an optimizer's is.
    GlobalPageManager.get_instance().paged_tensors.append(pages[0])
    addresses = [page.data_ptr() for page in pages]
    circle: list[object] = [*pages]
    circle.append(circle)
    del pages, circle
    assert free_pages(heap.free) == 2
    assert sorted(heap.freed) == sorted(zip(addresses, (0, 1), strict=True))
    assert not GlobalPageManager.get_instance().paged_tensors and free_pages(heap.free) == 0


@pytest.mark.parametrize("kept", ["page", "view", "array"])
def test_none_is_freed_while_one_is_in_use(heap: Heap, kept: str):
    heap.page()
    page = heap.page()
    left = {"page": page, "view": page[2:4].detach(), "array": page.numpy()}[kept]
    del page
    with pytest.raises(RuntimeError, match="1 of 2 pages of optimizer state are still in use"):
        free_pages(heap.free)
    assert not heap.freed and left.shape[1] == 10


def test_a_process_without_pages_needs_no_driver():
    assert free_pages() == 0
