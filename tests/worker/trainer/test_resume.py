"""A resumed run equals the uninterrupted one, bit for bit; an incomplete checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go, attempt
from worker.ml.checkpoint import ADAPTER, BadCheckpoint, describe, verify
from worker.trainer import protocol
from worker.trainer.protocol import TrainSpec

# 12 rows in batches of 4: three steps an epoch. Step 4 lies within the second epoch, step 3 on its edge.
CASES: dict[str, dict[str, Any]] = {
    "qlora": {},
    "qlora_dropout_grouped": {"lora": {"lora_dropout": 0.3}, "group_by_length": True},
    "lora_dropout_shuffled": {"method": "lora", "lora": {"lora_dropout": 0.3}, "group_by_length": False},
    "packing": {"packing": True, "max_length": 32, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    "8bit": {"optim": "adamw_8bit", "lora": {"r": 64, "target_modules": "all-linear"}},
    "checkpointing_cosine": {"gradient_checkpointing": True, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3},
    "wrapped": {"packing": "wrapped", "max_length": 32, "gradient_accumulation_steps": 1},
    "neftune": {"neftune_noise_alpha": 5.0, "lora": {"lora_dropout": 0.1}, "warmup_steps": 2},
    "lion": {"optim": "lion_8bit", "lora": {"r": 64, "target_modules": "all-linear"}},
    "ademamix": {"optim": "ademamix_8bit", "lora": {"r": 64, "target_modules": "all-linear"}},
    "every_second_layer": {"gradient_checkpointing": 2, "lora": {"lora_dropout": 0.2}},
    "validated": {"validation": tiny.chat_rows(3), "eval_steps": 2, "lora": {"lora_dropout": 0.2}},
}


def resumed(made: Attempt, step: int, base: Path, tmp_path: Path) -> Attempt:
    """Resume the run of `made` from its checkpoint of `step`, in a folder of its own."""
    folder = tmp_path / f"resumed{step}"
    shutil.copytree(made.folder / "dataset", folder / "dataset")
    shutil.copytree(made.folder / "checkpoints" / f"step-{step:08d}", folder / "resume")
    spec = json.loads((made.folder / "spec.json").read_text()) | {"attempt": 2, "resume_from": "resume"}
    (folder / "spec.json").write_text(json.dumps(spec))
    return attempt(folder)


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bit_for_bit(go: Go, base: Path, tmp_path: Path, name: str):
    whole = go(**{"max_steps": 6, "save_steps": 1, "logging_steps": 2, **CASES[name]})
    for step in (3, 4):
        again = resumed(whole, step, base, tmp_path)
        assert again.adapter_bytes() == whole.adapter_bytes()
        assert history(again) == history(whole)
        assert again.result["tokens_trained"] == whole.result["tokens_trained"]
        for file in ("optimizer.pt", "scheduler.pt"):
            left, right = (torch.load(made.folder / "checkpoints" / "step-00000006" / file) for made in (again, whole))
            assert same(left, right), file


def history(made: Attempt) -> list[dict[str, Any]]:
    """Return the logged values that a resume must not change; TRL's own means of a log window begin anew at one."""
    assert made.run is not None
    means = ("mean_token_accuracy", "entropy")
    return [{name: value for name, value in entry.items() if name not in means} for entry in made.run.metrics]


def same(left: Any, right: Any) -> bool:
    """Return whether two nested states are equal, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_the_states_are_compared_truly():
    assert not same({"a": [torch.zeros(2)]}, {"a": [torch.zeros(2, dtype=torch.bfloat16)]})
    assert not same({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 1e-30])})


def test_a_run_resumed_after_its_last_step_exports_without_training(go: Go, base: Path, tmp_path: Path):
    whole = go(max_steps=2)
    again = resumed(whole, 2, base, tmp_path)
    assert again.code == 0 and again.adapter_bytes() == whole.adapter_bytes()
    assert not (again.folder / "checkpoints").exists()


@pytest.mark.parametrize("name", ADAPTER)
def test_a_checkpoint_that_lacks_a_file_is_refused(go: Go, base: Path, tmp_path: Path, name: str):
    folder = _checkpoint(go)
    (folder / name).unlink()
    with pytest.raises(BadCheckpoint, match=name):
        verify(folder)


def test_a_damaged_or_foreign_checkpoint_is_refused(go: Go):
    folder = _checkpoint(go)
    good = (folder / "scheduler.pt").read_bytes()
    assert verify(folder).step == 2
    (folder / "scheduler.pt").write_bytes(good[:-1] + b"x")
    with pytest.raises(BadCheckpoint, match=r"scheduler\.pt is not what was written"):
        verify(folder)
    (folder / "scheduler.pt").write_bytes(good)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    with pytest.raises(BadCheckpoint, match=r"training_args\.bin"):
        verify(folder)
    (folder / "training_args.bin").unlink()
    with pytest.raises(BadCheckpoint, match="another configuration"):
        verify(folder, "0" * 64)
    (folder / "manifest.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"no manifest\.json"):
        verify(folder)


def test_a_run_refuses_the_checkpoint_of_another_job(go: Go, base: Path, tmp_path: Path):
    whole = go(max_steps=2)
    spec = json.loads((whole.folder / "spec.json").read_text())
    for number, change in enumerate(
        ({"hyperparameters": {"learning_rate": 0.5}}, {"validation_split": 0.2}, {"chat_template": tiny.CHATML})
    ):
        (whole.folder / "spec.json").write_text(json.dumps(spec | {"job": spec["job"] | change}))
        again = resumed(whole, 2, base, tmp_path / str(number))
        assert again.code == protocol.BAD_CHECKPOINT and "another configuration" in again.failure.message


def test_a_field_that_this_version_added_changes_no_run(go: Go, base: Path, tmp_path: Path):
    """A job that was accepted before there were chat templates and splits of validation rows, going on after it."""
    whole = go(max_steps=3, save_steps=1)
    spec = json.loads((whole.folder / "spec.json").read_text())
    old = {name: value for name, value in spec["job"].items() if name not in ("chat_template", "validation_split")}
    (whole.folder / "spec.json").write_text(json.dumps(spec | {"job": old}))
    manifest = whole.folder / "checkpoints" / "step-00000002" / "manifest.json"
    made = json.loads(manifest.read_text()) | {"config_hash": TrainSpec.read(whole.folder).config_hash}
    manifest.write_text(json.dumps(made))
    again = resumed(whole, 2, base, tmp_path)
    assert again.code == protocol.DONE and again.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.parametrize("lost", ["metrics", "samples", "best"])
def test_a_checkpoint_that_counts_otherwise_is_refused_and_crashes_nothing(
    go: Go, base: Path, tmp_path: Path, lost: str
):
    whole = go(max_steps=2, save_steps=1)
    _rewrite(whole, 1, lambda manifest: manifest["counters"].pop(lost))
    again = resumed(whole, 1, base, tmp_path)
    assert again.code == protocol.BAD_CHECKPOINT and again.failure.code == "bad_checkpoint"


def test_a_checkpoint_that_other_libraries_made_and_these_cannot_load_is_refused(go: Go, base: Path, tmp_path: Path):
    whole = go(max_steps=2, save_steps=1)
    folder = whole.folder / "checkpoints" / "step-00000001"
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    _rewrite(whole, 1, lambda manifest: manifest["files"].update({"optimizer.pt": describe(folder / "optimizer.pt")}))
    with pytest.raises(ValueError, match="parameter group"):
        resumed(whole, 1, base, tmp_path / "same")
    _rewrite(whole, 1, lambda manifest: manifest["versions"].update(torch="1.0"))
    again = resumed(whole, 1, base, tmp_path / "other")
    assert again.code == protocol.BAD_CHECKPOINT and "other versions of the libraries" in again.failure.message


def _rewrite(made: Attempt, step: int, change: Callable[[dict[str, Any]], object]) -> None:
    path = made.folder / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _checkpoint(go: Go) -> Path:
    # One run is enough for all the tests that spoil a copy of its checkpoint.
    made = go(max_steps=2)
    return made.folder / "checkpoints" / "step-00000002"
