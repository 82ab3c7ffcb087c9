"""What "auto" means, how long a run is, and the steps of the memory ladder."""

from __future__ import annotations

import pytest

from common.errors import InvalidInput
from common.schedule import resolve_max_length
from common.schemas.hyperparameters import Hyperparameters
from common.schemas.jobs import JobSpec
from worker.ml.options import Options, row_limit, settle, shrunk


def options(num_rows: int = 1000, *, shrink: int = 0, num_packed: int | None = None, **hyperparameters) -> Options:
    job = JobSpec.model_validate({"model": "m", "dataset": "dataset:1", "hyperparameters": hyperparameters})
    return settle(job, num_rows=num_rows, max_length=128, cuda=True, shrink=shrink, num_packed=num_packed)


def test_max_length_is_bounded_by_the_context():
    assert resolve_max_length(Hyperparameters(), 2048) == 1024
    assert resolve_max_length(Hyperparameters(), 512) == 512
    assert resolve_max_length(Hyperparameters(), None) == 1024
    assert resolve_max_length(Hyperparameters(max_length=512), 512) == 512
    with pytest.raises(InvalidInput, match=r"hyperparameters\.max_length is 513, but .* context is 512") as caught:
        resolve_max_length(Hyperparameters(max_length=513), 512)
    assert caught.value.param == "hyperparameters.max_length" and "512" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("rows", "micro", "accumulation", "epochs", "steps"),
    [(1000, 4, 4, 1.0, 63), (16, 4, 4, 1.0, 1), (17, 4, 4, 3.0, 6), (1, 4, 4, 1.0, 1), (100, 1, 1, 0.5, 50)],
)
def test_steps_are_counted_as_the_trainer_does(rows: int, micro: int, accumulation: int, epochs: float, steps: int):
    found = options(
        rows, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    assert found.total_steps == steps
    assert options(rows, max_steps=5).total_steps == 5


def test_packing_counts_sequences():
    assert options(1000, packing=True, num_packed=160).total_steps == 10
    assert options(1000, packing=False, num_packed=160).total_steps == 63


@pytest.mark.parametrize(
    ("before", "shrink", "after"),
    [
        ((4, 4, 0), 0, (4, 4, 0)),
        ((4, 4, 0), 1, (2, 8, 0)),
        ((4, 4, 3), 2, (1, 16, 3)),
        ((4, 4, 0), 3, (1, 16, 1)),
        ((4, 4, 3), 3, (1, 16, 1)),
        ((3, 2, 0), 1, (1, 6, 0)),
        ((1, 16, 1), 3, (1, 16, 1)),
        ((7, 1, 0), 1, (1, 7, 0)),
    ],
)
def test_the_ladder(before: tuple[int, int, int], shrink: int, after: tuple[int, int, int]):
    assert shrunk(*before, shrink) == after


def test_words_for_packing_and_checkpointing():
    assert [options(packing=asked).packing for asked in (False, True, "bfd", "wrapped", "auto")] == [
        None,
        "bfd",
        "bfd",
        "wrapped",
        None,
    ]
    assert [options(gradient_checkpointing=asked).checkpointing for asked in (False, True, 1, 3, "auto")] == [
        0,
        1,
        1,
        3,
        1,
    ]
    assert row_limit(Hyperparameters(packing="wrapped"), 128) > 10**9
    assert row_limit(Hyperparameters(packing=True), 128) == 128


def test_warm_up_is_given_once():
    assert options(warmup_ratio=0.1).warmup == 0.1
    assert options(warmup_steps=10, warmup_ratio="auto").warmup == 10
    assert options(warmup_steps="auto", warmup_ratio="auto").warmup == 0.03
    with pytest.raises(ValueError, match="warmup_steps: warmup_ratio says"):
        Hyperparameters(warmup_steps=10, warmup_ratio=0.1)


def test_what_was_chosen_is_said():
    assert options().choices[0].data.keys() == {"save_steps", "eval_steps", "max_length"}
    asked = {"save_steps": 5, "eval_steps": 5, "max_length": 128}
    assert options(**asked).choices == ()
    assert [choice.name for choice in options(shrink=1, **asked).choices] == ["memory.shrunk"]


@pytest.mark.parametrize(("method", "rate"), [("qlora", 2e-4), ("lora", 2e-4), ("full", 2e-5)])
def test_auto_is_the_rate_of_the_method(method: str, rate: float):
    asked = {"method": method, "hyperparameters": {"learning_rate": "auto"}}
    job = JobSpec.model_validate({"model": "m", "dataset": "dataset:1", **asked})
    assert settle(job, num_rows=9, max_length=128, cuda=True).learning_rate == rate


def test_small_datasets_are_seen_more_often():
    assert [options(rows, num_train_epochs="auto").num_train_epochs for rows in (100, 1000, 10000)] == [3.0, 2.0, 1.0]
