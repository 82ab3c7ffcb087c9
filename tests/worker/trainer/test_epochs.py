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
from worker.trainer.epochs import EpochEnds
from worker.trainer.protocol import Checkpoint
from worker.trainer.results import COLUMNS

# 12 rows in batches of 4: three steps an epoch, too few for the steps that "auto" chooses.
EPOCHS = {"save_steps": "auto", "eval_steps": "auto", "max_steps": -1, "num_train_epochs": 3.0}


def steps(made: Attempt, kind: str = "eval") -> list[int]:
    assert made.run
    return [entry["step"] for entry in made.run.metrics if entry["kind"] == kind]


def checkpoints(made: Attempt) -> list[int]:
    return [message.step for message in made.messages if isinstance(message, Checkpoint)]


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


@pytest.mark.parametrize(("num_epochs", "asked"), [(50, True), (51, False)])
def test_an_epochs_end_asks_for_what_its_step_lacks(tmp_path: Path, num_epochs: int, asked: bool):
    ends = EpochEnds(Hyperparameters(), evaluated=True)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state = TrainerState(global_step=20, num_train_epochs=num_epochs)
    control = TrainerControl()
    ends.on_epoch_end(args, state, control)
    assert (control.should_save, control.should_evaluate) == (asked, asked)
    ends.on_save(args, state, control)
    ends.on_evaluate(args, state, control)
    stopped = TrainerControl(should_training_stop=True)
    for again, at in ((TrainerControl(), state), (stopped, TrainerState(global_step=21, num_train_epochs=1))):
        ends.on_epoch_end(args, at, again)
        assert not again.should_save and not again.should_evaluate


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
