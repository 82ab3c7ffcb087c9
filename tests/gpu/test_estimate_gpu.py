"""The estimate of memory against the peak that a card measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.running import run
from tests.gpu.test_memory_gpu import WIDE
from tests.worker.trainer import tiny
from worker.trainer import protocol

pytestmark = pytest.mark.gpu
BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 2048, "max_steps": 3}


@pytest.mark.parametrize("kernels", ["plain", "auto"])
@pytest.mark.parametrize(
    "job",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 2, "method": "lora"},
        {"gradient_checkpointing": "auto", "optim": "adamw_torch_fused"},
    ],
    ids=["none", "all", "lora", "auto"],
)
def test_the_estimate_is_near_the_measured_peak(tmp_path: Path, job: dict[str, Any], kernels: str):
    base = tiny.build_base(tmp_path / "base", **WIDE)
    rows = [{"text": tiny.sentence(index, 900)} for index in range(32)]
    made = run(tmp_path / "run", base, rows, kernels=kernels, **BATCH, **job)
    assert made.code == protocol.DONE
    memory = made.result["memory"]
    assert memory["estimated_bytes"] == pytest.approx(memory["measured_bytes"], rel=0.25), memory
