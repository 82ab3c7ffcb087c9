"""Each way in which an attempt ends: its exit code, what it tells the supervisor, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InfraError, InvalidInput
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go, attempt
from worker.ml.checkpoint import verify
from worker.trainer import protocol
from worker.trainer.faults import CRASHED, Diverged, Drained, classify
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Checkpoint, Message, Progress


def stopping(
    folder: Path, base: Path, command: dict[str, Any], job: dict[str, Any] | None = None, **hyperparameters: Any
) -> Attempt:
    """Run a job that gets `command` once its second step is done."""
    folder.mkdir()
    tiny.write_run(folder, base, hyperparameters={"max_steps": 50, "save_steps": 100, **hyperparameters}, **job or {})
    wishes = Wishes()

    def on_message(message: Message) -> None:
        if isinstance(message, protocol.Metrics) and message.step == 2:
            wishes.obey(command)

    return attempt(folder, wishes, on_message)


@pytest.mark.parametrize("command", [{"do": "stop"}, {"do": "deadline", "monotonic": 0.0}])
def test_a_run_that_is_asked_to_leaves_a_checkpoint_and_goes(tmp_path: Path, base: Path, command: dict[str, Any]):
    made = stopping(tmp_path / "run", base, command)
    assert made.code == protocol.DRAINED and not (made.folder / "out").exists()
    assert [message for message in made.messages if isinstance(message, Checkpoint)] == [
        Checkpoint(3, "checkpoints/step-00000003")
    ]
    assert verify(made.folder / "checkpoints" / "step-00000003").step == 3
    reason = {"stop": "asked to stop", "deadline": "lease was not renewed"}[command["do"]]
    assert reason in made.notes("run.drained")[0].message


def test_a_drained_run_goes_on_where_it_was(tmp_path: Path, base: Path, go: Go):
    drained = stopping(tmp_path / "run", base, {"do": "stop"}, max_steps=5)
    whole = go(max_steps=5, save_steps=100)
    (drained.folder / "checkpoints" / "step-00000003").rename(drained.folder / "resume")
    spec = json.loads((drained.folder / "spec.json").read_text()) | {"resume_from": "resume"}
    (drained.folder / "spec.json").write_text(json.dumps(spec))
    again = attempt(drained.folder)
    assert again.adapter_bytes() == whole.adapter_bytes()
    steps = [message.step for message in again.messages if isinstance(message, Progress)]
    assert steps[0] == 3 and again.notes("run.resumed")[0].data == {"step": 3}


def test_a_wish_before_the_first_step_needs_no_checkpoint(go: Go):
    wishes = Wishes()
    wishes.obey({"do": "stop"})
    made = go(wishes=wishes)
    assert made.code == protocol.DRAINED and not (made.folder / "checkpoints").exists()


def test_a_wish_at_the_last_step_does_not_keep_the_run_from_ending(tmp_path: Path, base: Path):
    made = stopping(tmp_path / "run", base, {"do": "stop"}, max_steps=3)
    assert made.code == protocol.DONE and made.result["steps"] == 3


def test_commands_are_taken_back_renewed_and_passed_over():
    wishes = Wishes()
    for command in (None, [], "stop", {"do": "dance"}, {"do": "deadline"}, {"do": "deadline", "monotonic": "soon"}):
        wishes.obey(command)
    assert wishes.reason() is None
    wishes.obey({"do": "stop"})
    wishes.obey({"do": "run"})
    assert wishes.reason() is None
    wishes.obey({"do": "deadline", "monotonic": time.monotonic() - 1})
    assert wishes.reason() and not wishes.overdue()
    wishes.obey({"do": "deadline", "monotonic": time.monotonic() + 60})
    assert wishes.reason() is None
    with pytest.raises(Drained, match="asked to stop"):
        wishes.obey({"do": "stop"})
        wishes.leave_if_asked()


def test_a_deadline_is_overdue_when_the_lease_is_over(monkeypatch: pytest.MonkeyPatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    wishes = Wishes()
    wishes.obey({"do": "deadline", "monotonic": 1100.0})
    seen = []
    for clock[0] in (1099.0, 1100.0, 1119.0, 1120.0):
        seen.append((wishes.reason() is not None, wishes.overdue()))
    assert seen == [(False, False), (True, False), (True, False), (True, True)]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, go: Go):
    broken = tiny.build_base(tmp_path / "broken")
    spoil(broken, "model.norm.weight", float("nan"))
    made = go(base=broken)
    assert made.code == protocol.DIVERGED and made.failure.code == "diverged"
    assert "the loss is nan at step 1" in made.failure.message
    assert made.failure.param == "hyperparameters.learning_rate" and made.failure.hint
    assert not (made.folder / "checkpoints").exists()


def explode_at(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """Let the update of a step throw the output head far off: its loss stays a number, and training goes on."""
    from worker.ml.sft import Trainer

    step = Trainer.training_step

    def thrown(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == at_step:
            self.model.lm_head.weight.data.mul_(-60)
        return loss

    monkeypatch.setattr(Trainer, "training_step", thrown)


LONG = {
    "method": "full", "learning_rate": 1e-2, "max_steps": 60, "save_steps": 6, "logging_steps": 1,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant",
}  # fmt: skip


def test_an_exploding_loss_stops_the_run_and_the_checkpoints_are_from_before(go: Go, monkeypatch: pytest.MonkeyPatch):
    explode_at(monkeypatch, 25)
    made = go(tiny.chat_rows(40), **LONG)
    assert made.code == protocol.DIVERGED and made.failure.code == "diverged", made.losses
    assert "the loss has exploded" in made.failure.message and made.failure.param == "hyperparameters.learning_rate"
    assert 26 < len(made.losses) < 26 + 20, "within a window"
    assert min(made.losses[26:]) > 3 * min(made.losses), "it was an explosion, not noise"
    kept = sorted(path.name for path in (made.folder / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (6, 12, 18, 24)]
    assert [note.data["step"] for note in made.notes("checkpoint.withheld")] == [30]


@pytest.mark.parametrize("ratio", [0, 1000.0])
def test_unless_the_job_lets_it(go: Go, monkeypatch: pytest.MonkeyPatch, ratio: float):
    explode_at(monkeypatch, 25)
    made = go(tiny.chat_rows(40), **LONG, max_loss_ratio=float(ratio))
    assert made.code == protocol.DONE and max(made.losses) > 20
    assert len(list((made.folder / "checkpoints").iterdir())) == 10 and not made.notes("checkpoint.withheld")


def test_a_checkpoint_with_broken_weights_is_not_kept(go: Go, monkeypatch: pytest.MonkeyPatch):
    from worker.ml.sft import Trainer

    # The loss of the step is still a number when its update spoils the weights.
    step = Trainer.training_step

    def poisoned(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 1:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    made = go(save_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert made.code == protocol.DIVERGED and "weights are not finite at step 2" in made.failure.message
    assert not (made.folder / "checkpoints" / "step-00000002").exists()


def spoil(base: Path, name: str, value: float) -> None:
    """Fill one tensor of a base with `value`."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights[name].fill_(value)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("rows", "options", "code", "words"),
    [
        ([{"text": ""}], {}, "bad_row", "dataset: row 1: text is empty"),
        ([{"text": "a"}, {"text": 1}, {"text": None}], {}, "bad_rows", "row 2: text is a number"),
        ([{"foo": "a"}], {}, "bad_row", "row 1: has the columns 'foo'"),
        (None, {"max_length": 512}, "max_length_beyond_context", "is 512, but the base model's context is 256"),
        (None, {"max_length": 9}, "nothing_to_train", "none of the 12 rows has a token to learn within max_length 9"),
        (None, {"lora": {"target_modules": ["query"]}}, "bad_target_modules", "has no module: 'query'"),
        (None, {"lora": {"target_modules": ["q_proj", "wq"]}}, "bad_target_modules", "nothing for these: 'wq'"),
        (None, {"lora": {"target_modules": ["lm_head"]}}, "bad_target_modules", "the output head 'lm_head'"),
        (None, {"lora": {"target_modules": "(unclosed"}}, "invalid_input", "is not a regular expression"),
        (None, {"lora": {"target_modules": ["input_layernorm"]}}, "bad_target_modules", "neither a linear layer"),
    ],
)
def test_bad_input_says_what_to_do(go: Go, rows: list[Any] | None, options: dict[str, Any], code: str, words: str):
    made = go(rows, **options)
    assert made.code == protocol.BAD_INPUT
    assert (made.failure.code, made.failure.hint is not None) == (code, True)
    assert words in made.failure.message
    if code == "bad_target_modules":
        hint = made.failure.hint or ""
        assert "lora.modules_to_save" in hint if "head" in words else "q_proj (2 times)" in hint
        assert "lm_head" not in hint


def test_a_job_of_another_version_is_refused_by_field(tmp_path: Path, base: Path):
    tiny.write_run(tmp_path, base, hyperparameters={"learning_rte": 1})
    made = attempt(tmp_path)
    assert made.code == protocol.BAD_INPUT and made.failure.param == "hyperparameters.learning_rte"


def test_a_base_without_weights_is_refused(tmp_path: Path, base: Path, go: Go):
    empty = tiny.build_base(tmp_path / "empty")
    (empty / "model.safetensors").rename(empty / "pytorch_model.bin")
    made = go(base=empty)
    assert made.code == protocol.BAD_INPUT and "pickle" in made.failure.message


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (InvalidInput("row 7"), protocol.BAD_INPUT, "invalid_input"),
        (Diverged("nan"), protocol.DIVERGED, "diverged"),
        (MemoryError(), protocol.OUT_OF_MEMORY, "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), protocol.OUT_OF_MEMORY, "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), protocol.OUT_OF_MEMORY, "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), protocol.OUT_OF_MEMORY, "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), protocol.DISK_FULL, "disk_full"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
            protocol.DISK_FULL,
            "disk_full",
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), protocol.DEVICE_FAULT, "device_fault"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), protocol.DEVICE_FAULT, "device_fault"),
        (InfraError("away"), CRASHED, "infra"),
        (RuntimeError("shapes do not match"), CRASHED, "trainer_crashed"),
        (KeyboardInterrupt(), CRASHED, "trainer_crashed"),
    ],
)
def test_errors_have_their_exit_codes(error: BaseException, code: int, word: str):
    found, failure = classify(error)
    assert found == code and failure is not None and failure.code == word


def test_a_cpu_that_cannot_allocate_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert classify(caught.value)[0] == protocol.OUT_OF_MEMORY


def test_a_drain_is_no_failure():
    assert classify(Drained("asked")) == (protocol.DRAINED, None)


def test_a_full_disk_is_told_apart(go: Go, monkeypatch: pytest.MonkeyPatch):
    import worker.trainer.keeping as keeping

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keeping, "seal", full)
    made = go()
    assert made.code == protocol.DISK_FULL and made.failure.code == "disk_full"
