"""The end of each epoch leaves a checkpoint and an evaluation, and what was measured is a table."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from common.schemas.hyperparameters import Hyperparameters
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from tests.worker.trainer.test_resume import history, resumed
from worker.trainer import protocol
from worker.trainer.epochs import EpochEnds
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Checkpoint
from worker.trainer.results import COLUMNS

# 12 rows in batches of 4: three steps an epoch, too few for the steps that "auto" chooses.
EPOCHS = {"save_steps": "auto", "eval_steps": "auto", "max_steps": -1, "num_train_epochs": 3.0}


def steps(made: Attempt, kind: str = "eval") -> list[int]:
    assert made.run
    return [entry["step"] for entry in made.run.metrics if entry["kind"] == kind]


def checkpoints(made: Attempt) -> list[int]:
    return [message.step for message in made.messages if isinstance(message, Checkpoint)]


class StopAfter(Wishes):
    """Wishes to go on for so many steps, and then to stop."""

    def __init__(self, num_steps: int):
        super().__init__()
        self._left = num_steps

    def leave_if_asked(self) -> None:
        """Not between the stages."""

    def reason(self) -> str | None:
        self._left -= 1
        return "the test wants it" if self._left < 0 else None


def test_each_epoch_leaves_a_checkpoint_and_an_evaluation(go: Go, base: Path, tmp_path: Path):
    whole = go(validation=tiny.chat_rows(4), lora={"lora_dropout": 0.2}, **EPOCHS)
    assert (checkpoints(whole), steps(whole)) == ([3, 6, 9], [3, 6, 9])
    for step in (3, 6):
        again = resumed(whole, step, base, tmp_path)
        assert again.adapter_bytes() == whole.adapter_bytes() and history(again) == history(whole)
        assert checkpoints(again) == [each for each in (6, 9) if each > step]


def test_steps_that_were_asked_for_are_all(go: Go):
    made = go(validation=tiny.chat_rows(4), **(EPOCHS | {"save_steps": 4, "eval_steps": 4}))
    assert (checkpoints(made), steps(made)) == ([4, 8, 9], [4, 8, 9])


@pytest.mark.parametrize(("num_epochs", "epoch", "asked"), [(50, 2.0, True), (50, 2.5, False), (51, 2.0, False)])
def test_the_last_step_of_an_epoch_asks(tmp_path: Path, num_epochs: int, epoch: float, asked: bool):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    control = TrainerControl()
    ends = EpochEnds(Hyperparameters(), evaluated=True)
    ends.on_step_end(args, TrainerState(epoch=epoch, global_step=20, num_train_epochs=num_epochs), control)
    assert (control.should_save, control.should_evaluate) == (asked, asked)


def test_the_checkpoint_of_an_epochs_last_step_holds_its_evaluation(go: Go, base: Path, tmp_path: Path):
    """Also where the step is saved anyway, and where the run is told to stop there."""
    shape = EPOCHS | {"save_steps": 3}
    whole = go(validation=tiny.chat_rows(4), load_best_model_at_end=True, **shape)
    assert (checkpoints(whole), steps(whole)) == ([3, 6, 9], [3, 6, 9])
    again = resumed(whole, 3, base, tmp_path)
    assert history(again) == history(whole) and again.adapter_bytes() == whole.adapter_bytes()
    left = go(validation=tiny.chat_rows(4), load_best_model_at_end=True, wishes=StopAfter(2), **shape)
    assert left.code == protocol.DRAINED and (checkpoints(left), steps(left)) == ([3], [3])


def test_a_run_that_stops_early_at_an_epochs_end_saves_that_step_once(go: Go):
    made = go(
        validation=tiny.chat_rows(4), early_stopping_patience=1, early_stopping_threshold=100.0,
        **(EPOCHS | {"save_steps": 3}),
    )  # fmt: skip
    assert (checkpoints(made), steps(made)) == ([3, 6], [3, 6])


def test_the_table_holds_what_was_logged(go: Go):
    made = go(validation=tiny.chat_rows(4), logging_steps=2, **EPOCHS)
    with (made.folder / "out" / "reports" / "metrics.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert tuple(lines[0]) == COLUMNS and COLUMNS[0] == "step"
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4, 6, 8, 9]
    assert made.run
    for kind, column in (("train", "train_loss"), ("eval", "valid_loss")):
        logged = {entry["step"]: entry["loss"] for entry in made.run.metrics if entry["kind"] == kind}
        assert {int(line["step"]): float(line[column]) for line in lines if line[column]} == logged
    assert float(lines[-1]["epoch"]) == 3.0 and lines[2]["train_loss"] == ""
    assert 0 < float(lines[-1]["train_accuracy"]) < 1 and float(lines[-1]["valid_mean_token_accuracy"]) >= 0
