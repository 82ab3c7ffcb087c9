"""Runs of the trainer in this process: a base of 130,000 weights, a dozen rows, one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.trainer import tiny
from worker.trainer.__main__ import read_run, run_stages
from worker.trainer.faults import classify
from worker.trainer.holding import Holder
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Failed, Message, Metrics, Note, Result
from worker.trainer.run import Run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model folder with a ChatML template."""
    return tiny.build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two test workers on two cores: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Attempt:
    """What one attempt came to."""

    folder: Path
    code: int = 0
    messages: list[Message] = field(default_factory=list)
    run: Run | None = None

    def notes(self, name: str) -> list[Note]:
        return [message for message in self.messages if isinstance(message, Note) and message.name == name]

    def metrics(self, kind: str = "train") -> list[dict[str, float]]:
        return [m.values for m in self.messages if isinstance(m, Metrics) and m.kind == kind]

    @property
    def losses(self) -> list[float]:
        return [values["loss"] for values in self.metrics()]

    @property
    def failure(self) -> Failed:
        return next(message for message in self.messages if isinstance(message, Failed))

    @property
    def result(self) -> dict[str, Any]:
        return next(message.report for message in self.messages if isinstance(message, Result))

    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "out" / "adapter" / "adapter_model.safetensors")

    def adapter_bytes(self) -> bytes:
        return (self.folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()


def attempt(
    folder: Path,
    wishes: Wishes | None = None,
    on_message: Callable[[Message], None] | None = None,
    holder: Holder | None = None,
) -> Attempt:
    """Run the job laid out in `folder` in this process; its base may be in `holder` from the job before."""
    made = Attempt(folder)

    def send(message: Message) -> None:
        made.messages.append(message)
        if on_message:
            on_message(message)

    try:
        made.run = read_run(folder, send, wishes or Wishes(), holder)
        run_stages(made.run)
    except BaseException as error:
        made.code, failure = classify(error)
        if made.code == 1:
            raise
        if failure:
            send(failure)
    return made


Go = Callable[..., Attempt]


@pytest.fixture
def go(tmp_path: Path, base: Path) -> Go:
    """Lay out and run a job: `go(rows, max_steps=3, lora={…})`; hyperparameters by name, the job's other fields too."""
    count = 0

    def run(rows: list[dict[str, Any]] | None = None, *, wishes: Wishes | None = None, **options: Any) -> Attempt:
        nonlocal count
        count += 1
        folder = tmp_path / f"run{count}"
        folder.mkdir()
        layout = {name: options.pop(name) for name in LAYOUT if name in options}
        job = {name: options.pop(name) for name in JOB if name in options}
        tiny.write_run(folder, layout.pop("base", base), rows, hyperparameters=options, **layout, **job)
        return attempt(folder, wishes)

    return run


LAYOUT = ("validation", "resume_from", "shrink", "base")
JOB = (
    "method", "lora", "quantization", "seed", "suffix", "chat_template", "validation_split", "sample_prompts", "export",
)  # fmt: skip
