"""The real child process: its pipe, its commands, its death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import attempt
from worker.ml.checkpoint import verify
from worker.trainer import protocol
from worker.trainer.protocol import Checkpoint, Message, Progress, Result

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class Child:
    """A trainer process as a supervisor starts it."""

    def __init__(self, folder: Path, *flags: str):
        self.folder = folder
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-m", "worker.trainer", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def messages(self) -> Iterator[Message]:
        assert self.process.stdout
        for line in self.process.stdout:
            yield protocol.decode(line)

    def until(self, kind: type[Message], step: int) -> Message:
        """Read on until a message of `kind` at `step` or later."""
        for message in self.messages():
            if isinstance(message, kind) and message.step >= step:  # type: ignore[attr-defined]
                return message
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def say(self, **command: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Wait for the end and close the pipes."""
        try:
            return self.process.wait(timeout=120)
        finally:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe
                pipe.close()


def lay_out(folder: Path, base: Path, **options: Any) -> Path:
    folder.mkdir()
    tiny.write_run(folder, base, **options)
    return folder


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, base: Path):
    options: dict[str, Any] = {
        "hyperparameters": {"max_steps": 20, "save_steps": 3},
        "lora": {"lora_dropout": 0.2},
    }
    killed = Child(lay_out(tmp_path / "killed", base, **options))
    killed.until(Checkpoint, 3)
    os.killpg(killed.process.pid, signal.SIGKILL)
    assert killed.end() == -signal.SIGKILL
    whole = attempt(lay_out(tmp_path / "whole", base, **options))
    checkpoints = sorted((killed.folder / "checkpoints").iterdir())
    assert all(verify(folder).step >= 3 for folder in checkpoints)
    resumed = lay_out(tmp_path / "resumed", base, **options, resume_from="resume")
    checkpoints[-1].rename(resumed / "resume")
    child = Child(resumed)
    last = list(child.messages())[-1]
    assert child.end() == protocol.DONE and isinstance(last, Result)
    name = "out/adapter/adapter_model.safetensors"
    assert (resumed / name).read_bytes() == whole.adapter_bytes()
    assert last.report["tokens_trained"] == whole.result["tokens_trained"]


def test_a_stopped_run_leaves_with_a_checkpoint(tmp_path: Path, base: Path):
    child = Child(lay_out(tmp_path / "run", base, hyperparameters={"max_steps": 100_000, "save_steps": 100_000}))
    child.until(Progress, 1)
    child.say(do="deadline", monotonic=time.monotonic() + 600)
    child.say(do="stop")
    saved = child.until(Checkpoint, 1)
    assert child.end() == protocol.DRAINED
    assert verify(child.folder / saved.folder).step == saved.step  # type: ignore[attr-defined]


def test_a_run_whose_supervisor_is_gone_goes_too(tmp_path: Path, base: Path):
    child = Child(lay_out(tmp_path / "run", base, hyperparameters={"max_steps": 100_000, "save_steps": 100_000}))
    child.until(Progress, 1)
    assert child.process.stdin
    child.process.stdin.close()
    assert child.process.wait(timeout=30) not in (protocol.DONE, protocol.DRAINED)
    assert child.process.stdout
    child.process.stdout.close()


def test_a_run_dies_with_its_parent(tmp_path: Path, base: Path):
    folder = lay_out(tmp_path / "run", base, hyperparameters={"max_steps": 100_000, "save_steps": 100_000})
    # A pipe that this test holds open: the parent's death is the only thing that the child can notice.
    reading, writing = os.pipe()
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'worker.trainer', {str(folder)!r}], "
        f"stdin={reading}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, pass_fds=[reading], env=ENVIRONMENT
    )
    assert parent.stdout
    grandchild = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 60
    while not (folder / "tokens").exists():
        assert time.monotonic() < deadline and grandchild.is_running()
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs([grandchild], timeout=10)
    assert gone and not alive
    parent.stdout.close()
    os.close(reading)
    os.close(writing)


def test_a_bad_spec_fails_before_torch_is_loaded(tmp_path: Path, base: Path):
    child = Child(lay_out(tmp_path / "run", base, hyperparameters={"max_steps": 0}), "-X", "importtime")
    said = list(child.messages())
    assert child.end() == protocol.BAD_INPUT
    assert [(message.code, message.param) for message in said] == [("invalid_input", "hyperparameters")]
    assert b"| torch" not in (child.folder / "log").read_bytes()
