"""Batch and checkpointing that are left to the worker, chosen by the memory that is free, and kept by a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worker.trainer.conftest import Attempt, Go
from tests.worker.trainer.test_resume import resumed
from worker.ml import budget
from worker.trainer import protocol

OPEN = {
    "per_device_train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_checkpointing": "auto",
}


def chosen(made: Attempt) -> tuple[int, int, int]:
    assert made.run is not None
    options = made.run.options
    return options.micro_batch, options.accumulation, options.checkpointing


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the memory that a run finds."""

    def to(num_bytes: int) -> None:
        monkeypatch.setattr(budget, "free_bytes", lambda device: num_bytes)

    return to


def test_what_is_free_decides_and_a_resumed_run_keeps_it(go: Go, base: Path, tmp_path: Path, free: Any):
    free(16 << 30)
    roomy = go(**OPEN, max_steps=2, save_steps=1)
    assert chosen(roomy) == (4, 4, 0)
    needed = roomy.result["memory"]["estimated"]["allocated_bytes"]

    free(int(needed * 0.7))
    tight = go(**OPEN, max_steps=2, save_steps=1)
    micro, accumulation, _ = chosen(tight)
    assert micro < 4 and micro * accumulation == 16
    assert tight.result["memory"]["estimated"]["allocated_bytes"] <= needed * 0.7 * 0.92
    (told,) = tight.notes("auto.resolved")
    assert told.data["per_device_train_batch_size"] == micro

    # On a worker with more memory, the run goes on as it began.
    free(16 << 30)
    again = resumed(tight, 1, base, tmp_path)
    assert chosen(again) == chosen(tight)
    assert again.adapter_bytes() == tight.adapter_bytes() and again.losses[-1] == tight.losses[-1]


def test_what_is_left_open_goes_with_what_was_asked_for(go: Go, free: Any):
    free(16 << 30)
    assert chosen(go(**OPEN | {"per_device_train_batch_size": 2}, max_steps=1)) == (2, 8, 0)
    assert chosen(go(**OPEN | {"gradient_accumulation_steps": 8}, max_steps=1)) == (2, 8, 0)


def test_no_more_is_planned_with_than_the_job_may_take(go: Go, free: Any):
    free(16 << 30)
    roomy = go(**OPEN, max_steps=1)
    most = roomy.result["memory"]["estimated"]["allocated_bytes"] * 0.7
    micro, accumulation, _ = chosen(go(**OPEN, max_steps=1, max_memory_gib=most / 2**30))
    assert micro < 4 and micro * accumulation == 16


def test_where_nothing_fits_it_says_so_and_tries(go: Go, free: Any):
    free(1 << 17)
    made = go(**OPEN, max_steps=1)
    assert chosen(made) == (1, 16, 1) and made.code == protocol.DONE
    (told,) = made.notes("memory.tight")
    assert told.level == "warning" and told.data["free_bytes"] == 1 << 17 < told.data["needed_bytes"]


def test_the_ladder_goes_on_from_what_was_chosen(go: Go, free: Any):
    free(16 << 30)
    assert chosen(go(**OPEN, max_steps=1, shrink=1)) == (2, 8, 0)
    assert chosen(go(**OPEN, max_steps=1, shrink=3)) == (1, 16, 1)


def test_the_report_has_the_estimate_and_what_was_measured(go: Go):
    memory = go(max_steps=1).result["memory"]
    estimated = memory["estimated"]
    assert sum(estimated["parts"].values()) == estimated["total_bytes"] == memory["estimated_bytes"]
    assert memory["measured_bytes"] > 0 and memory["batch"]["rows"] == 2
    assert memory["error"] == pytest.approx(memory["estimated_bytes"] / memory["measured_bytes"] - 1, abs=1e-3)


def test_on_the_fast_path_the_estimate_is_of_how_it_cuts_a_step(go: Go):
    lengths = {"lora": {"lora_dropout": 0.0}, "max_steps": 2}
    plain, made = go(kernels="plain", **lengths), go(kernels="fused", **lengths)
    assert made.run is not None and made.run.fused is not None
    memory, other = made.result["memory"], plain.result["memory"]
    # All rows of the step, in one piece.
    assert memory["batch"]["rows"] == made.run.options.micro_batch * made.run.options.accumulation
    assert memory["estimated"]["parts"]["activations"] != other["estimated"]["parts"]["activations"]
    assert memory["estimated_bytes"] == sum(memory["estimated"]["parts"].values()) and memory["measured_bytes"]
