"""What the API takes, a trainer can be told: every number at its bounds survives being settled and said to TRL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.schemas.jobs import JobSpec
from tests.hostile import bounds
from worker.ml.arguments import choose_optimizer, sft_config
from worker.ml.options import settle
from worker.ml.precision import Precision

FIELDS = [field for field in bounds.fields() if field.path[0] in ("hyperparameters", "seed")]

PLAIN = Precision(torch.float32, torch.float32, torch.float32)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_extremes_are_arguments(tmp_path: Path, field: bounds.Field):
    values = bounds.at_the_bounds(field)
    assert values
    for value in values:
        if (field.name, value) == ("hyperparameters.max_steps", 0):
            continue
        job = JobSpec.model_validate(
            {"model": "a/b", "dataset": "dataset:ds_0", "validation_dataset": "dataset:ds_1"} | field.body(value)
        )
        for num_rows in (1, 10_000_000):
            options = settle(job, num_rows=num_rows, max_length=64, cuda=False)
            assert options.total_steps >= 1 and options.micro_batch >= 1 and options.accumulation >= 1
            cpu = torch.device("cpu")
            made = sft_config(
                options, PLAIN, cpu, optim=choose_optimizer(options.optim, cpu)[0], folder=tmp_path, seed=job.seed,
                evaluated=True,
            )  # fmt: skip
            assert made.per_device_train_batch_size == options.micro_batch
