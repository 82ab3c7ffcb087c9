"""When an evaluation is the best, and how long a run waits for a better one; which weights are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.schemas.jobs import JobSpec
from worker.ml.best import Best, store_weights, take_weights
from worker.ml.options import settle

BODY = {"model": "m", "dataset": "dataset:1"}


def test_patience_counts_evaluations_without_enough_of_an_improvement():
    best, seen = Best(), []
    for step, loss in enumerate([3.0, 2.0, 1.95, 1.96, 1.0]):
        best.see(step, loss, 0.1)
        seen.append((best.step, best.waited))
    assert seen == [(0, 0), (1, 0), (2, 1), (2, 2), (4, 0)]


def test_only_trained_weights_are_kept_and_given_back(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    store_weights(model, tmp_path / "best.safetensors")
    for parameter in model.parameters():
        parameter.data.zero_()
    take_weights(model, tmp_path / "best.safetensors")
    assert all(torch.equal(*pair) for pair in zip(list(model.parameters())[2:], before[2:], strict=True))
    assert not any(parameter.any() for parameter in model[0].parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


@pytest.mark.parametrize(
    ("options", "patience", "keep_best"),
    [
        ({}, 0, False),
        ({"early_stopping_patience": 2}, 2, True),
        ({"early_stopping_patience": "auto"}, 3, True),
        ({"early_stopping_patience": 2, "load_best_model_at_end": False}, 2, False),
        ({"load_best_model_at_end": True}, 0, True),
    ],
)
def test_who_stops_early_publishes_the_best(options: dict[str, object], patience: int, keep_best: bool):
    job = JobSpec.model_validate(BODY | {"validation_split": 0.1, "hyperparameters": options})
    found = settle(job, num_rows=100, max_length=64, cuda=False)
    assert (found.patience, found.keep_best) == (patience, keep_best)


@pytest.mark.parametrize("options", [{"early_stopping_patience": 1}, {"load_best_model_at_end": True}])
def test_without_validation_rows_there_is_no_best(options: dict[str, object]):
    with pytest.raises(ValueError, match=r"hyperparameters\.\w+: needs a validation_dataset or a validation_split"):
        JobSpec.model_validate(BODY | {"hyperparameters": options})
    assert (
        settle(
            JobSpec.model_validate(BODY | {"hyperparameters": dict.fromkeys(options, "auto")}),
            num_rows=1,
            max_length=64,
            cuda=False,
        ).keep_best
        is False
    )


def test_rows_for_validation_are_named_once():
    with pytest.raises(ValueError, match="validation_split: validation_dataset names other rows"):
        JobSpec.model_validate(BODY | {"validation_split": 0.1, "validation_dataset": "dataset:2"})
