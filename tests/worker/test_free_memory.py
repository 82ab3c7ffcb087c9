"""What a worker says is free of its card: what others left, never less what its own trainer holds."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from common import workers
from common.cards import free_bytes
from tests.worker.conftest import Bench
from worker.free_memory import FreeMemory
from worker.supervisor import Supervisor
from worker.training import Training
from worker.workplace import Device, Workplace

MIB, GIB = 2**20, 2**30
CARD = Device("cuda:0", "a card", 80 * GIB)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand in for the driver's program, which no machine without a card has; it says what the file holds."""
    (tmp_path / "bin").mkdir()
    program, says = tmp_path / "bin" / "nvidia-smi", tmp_path / "free"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {says}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    says.write_text("40000\n70000\n")
    return says


def test_the_driver_is_asked(driver: Path, monkeypatch: pytest.MonkeyPatch):
    assert (free_bytes("cuda:0"), free_bytes("cuda:1"), free_bytes("cuda:2")) == (40_000 * MIB, 70_000 * MIB, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    free_bytes("cuda:0")
    assert (driver.parent / "asked").read_text().splitlines()[-1].endswith("--id 3")
    driver.write_text("[N/A]\n")
    assert free_bytes("cuda:0") is None
    (driver.parent / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert free_bytes("cuda:0") is None


def test_nothing_is_measured_while_a_trainer_is_there():
    marks = iter([None, 1, 1, 1, 2, 2, None])
    seen = iter([10, 20, 30])
    memory = FreeMemory(CARD, lambda: next(marks), lambda device: next(seen))
    told = []
    for _ in range(4):
        memory.measure()
        told.append(memory.bytes)
    # One was there; none; one came and went meanwhile; one came meanwhile.
    assert told == [None, 10, 10, 10]


def test_a_worker_reports_what_others_leave(bench: Bench, driver: Path):
    worker = Supervisor(bench.context, Training(), Workplace(bench.context.settings), CARD)
    bench.supervisors.append(worker)
    job = bench.submit(stays=True)
    bench.check()
    worker.start()
    deadline = time.monotonic() + 60

    def reported() -> int | None:
        with bench.context.read() as session:
            return next((one.free_bytes for one in workers.listed(session) if one.id == worker.worker_id), None)

    while reported() is None:
        assert time.monotonic() < deadline
        threading.Event().wait(0.1)
    assert reported() == 40_000 * MIB
    worker.work_off()
    assert bench.row(job).status == "succeeded"
    driver.write_text("1000\n")
    worker._free.measure()
    assert worker._free.bytes == 40_000 * MIB, "its warm trainer's memory is no other's"
    worker._work.close()
    worker._free.measure()
    assert worker._free.bytes == 1000 * MIB
