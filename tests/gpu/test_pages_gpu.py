"""A process whose optimizer was paged takes the next run: its pages go back to the driver."""

from __future__ import annotations

import ctypes
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.running import give_back
from tests.worker.trainer import tiny
from worker.trainer import protocol
from worker.trainer.protocol import Failed, Idle, Metrics, Result

if TYPE_CHECKING:
    from tests.worker.trainer.test_child import Child

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12}
# 21 million parameters in tensors of 131,072 or more: 42 MB of pages.
LORA = {"r": 256, "lora_dropout": 0.0}
_IS_MANAGED = 8


def is_managed(address: int) -> bool:
    """Return whether the driver knows managed memory at `address`."""
    found = ctypes.c_int()
    code = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(found), ctypes.c_int(_IS_MANAGED), ctypes.c_uint64(address)
    )
    return code == 0 and found.value == 1


def test_the_driver_frees_what_the_library_took():
    import torch
    from bitsandbytes.functional import GlobalPageManager, fill, get_paged

    from worker.trainer.pages import free_pages

    manager = GlobalPageManager.get_instance()
    # Of tests before, in this process.
    manager.initialize()
    torch.zeros(1, device="cuda")
    for _ in range(3):
        page = get_paged(1024, 1024, dtype=torch.uint8, device=torch.device("cuda", 0))
        fill(page, 1)
        manager.paged_tensors.append(page)
    del page
    addresses = [page.data_ptr() for page in manager.paged_tensors]
    assert len(set(addresses)) == 3 and all(map(is_managed, addresses))
    assert free_pages() == 3 and not any(map(is_managed, addresses))
    assert float(torch.ones(8, device="cuda").sum()) == 8, "the card is as it was"


def lay_out(folder: Path, base: Path, *, keep: bool) -> Path:
    folder.mkdir()
    options = {"optim": "paged_adamw_8bit", "max_steps": 4, "save_steps": 100, "learning_rate": 1e-4}
    spec = tiny.write_run(folder, base, hyperparameters=options, lora=LORA)
    replace(spec, device="cuda:0", keep=keep).write(folder)
    return folder


def hear(child: Child) -> tuple[Result, list[float], bool]:
    """Return the result of the child's present run, its losses, and whether the child waits for another."""
    result, losses = None, []
    for message in child.messages():
        assert not isinstance(message, Failed), message
        if isinstance(message, Metrics) and message.kind == "train":
            losses.append(message.values["loss"])
        if isinstance(message, Result):
            result = message
        if isinstance(message, Idle):
            break
    assert result is not None, (child.folder / "log").read_text()[-2000:]
    return result, losses, isinstance(message, Idle)


def test_ten_jobs_with_pages_in_one_process(tmp_path: Path):
    import psutil
    import torch

    from tests.worker.trainer.test_child import Child

    base = tiny.build_base(tmp_path / "base", **WIDE)
    give_back()
    fresh = Child(lay_out(tmp_path / "fresh", base, keep=False))
    alone, expected, waits = hear(fresh)
    assert fresh.end() == protocol.DONE and not waits and len(expected) == 4
    pages_bytes = 2 * alone.report["trainable_parameters"]
    assert alone.report["optim"] == "paged_adamw_8bit" and pages_bytes > 40_000_000

    folder = lay_out(tmp_path / "run0", base, keep=True)
    child = Child(folder)
    free, resident = [], []
    try:
        for count in range(1, 11):
            made, losses, waits = hear(child)
            assert waits, (child.folder / "log").read_text()[-2000:]
            assert made.report["base_load"]["from"] == ("files" if count == 1 else "memory")
            # The backward pass of attention adds in any order.
            assert losses == pytest.approx(expected, abs=1e-3)
            free.append(torch.cuda.mem_get_info()[0])
            resident.append(psutil.Process(child.process.pid).memory_info().rss)
            shutil.rmtree(folder / "out")
            folder = lay_out(tmp_path / f"run{count}", base, keep=True)
            child.say(do="run", folder=str(folder), monotonic=time.monotonic() + 600)
    finally:
        child.process.kill()
        child.end()
    # Nine runs would leave nine times their pages, on the card or in the process; the first has met everything.
    assert free[0] - free[-1] < 2 * pages_bytes, free
    assert resident[-1] - resident[0] < 2 * pages_bytes, resident
