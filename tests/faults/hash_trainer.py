"""A trainer without torch: a hash chain instead of a model, with the real protocol, checkpoints and exit codes.

Fault runs measure faults, not imports. Its result depends on the data, the seed and the number of steps only, so that
an interrupted run must end in the same bytes as an undisturbed one. `metadata` of the job says how it behaves:
`step_s` (seconds a step), `fault` (`crash`, `oom`, `orphan`, `odd_words`, `hang`, `diverge`, `bad_input`,
`bad_checkpoint`, `device`, `full`) at step `fault_at`, in attempts up to `fault_attempts`; `late`: it dies after its
result. `trail` is a file to which
each step appends a line, before anybody else hears of it: `time job epoch what step value`, a log that no fault of the
service can touch. `refuses_from` is a step: checkpoints of it and later ones are refused, as by a trainer of another
version. `ballast_bytes` makes checkpoints as large as real ones; a resume from one whose ballast is torn ends the
attempt.
An export takes as many steps, without checkpoints, and writes the adapter's value into each model.
`mutters` is written to standard error. `stays` lets the process wait for a next run over the same base, where the spec
allows that.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from worker.trainer import protocol
from worker.trainer.protocol import Checkpoint, Failed, Idle, Metrics, Note, Progress, Result, Sender, Stage, TrainSpec

PR_SET_PDEATHSIG = 1
FAULTS = {
    "oom": (protocol.OUT_OF_MEMORY, "out_of_memory"),
    "diverge": (protocol.DIVERGED, "diverged"),
    "bad_input": (protocol.BAD_INPUT, "bad_row"),
    "bad_checkpoint": (protocol.BAD_CHECKPOINT, "bad_checkpoint"),
    "device": (protocol.DEVICE_FAULT, "device_fault"),
    "full": (protocol.DISK_FULL, "disk_full"),
}


class Commands:
    """What the supervisor has said so far."""

    def __init__(self) -> None:
        self.run = threading.Event()
        self.stop = threading.Event()
        self.deadline = float("inf")
        self.next: queue.SimpleQueue[Path] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        # Unbuffered: a daemon thread that holds a buffer's lock breaks the interpreter's exit.
        for line in open(0, "rb", buffering=0, closefd=False):  # noqa: SIM115
            command = json.loads(line)
            if command["do"] == "run" and "folder" in command:
                self.deadline = command["monotonic"]
                self.next.put(Path(command["folder"]))
            elif command["do"] == "run":
                self.run.set()
            elif command["do"] == "stop":
                self.stop.set()
            elif command["do"] == "deadline":
                self.deadline = command["monotonic"]
        os._exit(1)  # the supervisor is gone

    def rest(self) -> None:
        self.stop.clear()
        self.deadline = float("inf")

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    @property
    def leave(self) -> bool:
        return self.stop.is_set() or self.late


class Trail:
    """Says outside what this attempt does; one write a line, so that lines of several processes never mix."""

    def __init__(self, path: str | None, who: str):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if path else None
        self._who = who

    def __call__(self, what: str, step: int, value: str) -> None:
        if self._file is not None:
            os.write(self._file, f"{time.time():.6f} {self._who} {what} {step} {value}\n".encode())


class Run:
    """One attempt at a chain of hashes."""

    def __init__(self, folder: Path, commands: Commands):
        self.folder = folder
        self.spec = TrainSpec.read(folder)
        self.say = Sender(sys.stdout.buffer)
        self.commands = commands
        asked = self.spec.job["hyperparameters"]
        self.max_steps = asked["max_steps"] if asked["max_steps"] != -1 else 10
        self.save_steps = 2 if asked["save_steps"] == "auto" else asked["save_steps"]
        metadata = self.spec.job["metadata"]
        self.step_s = float(metadata.get("step_s", 0.01))
        self.fault, self.fault_at = metadata.get("fault"), int(metadata.get("fault_at", 1))
        self.fault_attempts = int(metadata.get("fault_attempts", 10**6))
        print(metadata.get("mutters", ""), file=sys.stderr)
        self.stays = self.spec.base_key() is not None and metadata.get("stays") == "True"
        self.ballast_bytes = int(metadata.get("ballast_bytes", 0))
        self.trail = Trail(metadata.get("trail"), f"{self.spec.job_id} {self.spec.attempt}")
        self.step, self.value = self._start()

    def _start(self) -> tuple[int, str]:
        if self.spec.adapter:
            return 0, (self.folder / self.spec.adapter / "adapter_model.safetensors").read_text()
        if self.spec.resume_from:
            found = self.folder / self.spec.resume_from
            state = json.loads((found / "state.json").read_text())
            if state["step"] >= int(self.spec.job["metadata"].get("refuses_from", 10**6)):
                self.say(Failed("bad_checkpoint", f"step {state['step']} is of another version"))
                sys.exit(protocol.BAD_CHECKPOINT)
            if self.ballast_bytes and (found / "ballast.bin").read_bytes() != self._ballast(state["value"]):
                sys.exit("the ballast of the checkpoint is torn")
            return state["step"], state["value"]
        data = (self.folder / self.spec.train_file).read_bytes()
        return 0, hashlib.sha256(data + str(self.spec.job["seed"]).encode()).hexdigest()

    def _ballast(self, value: str) -> bytes:
        return random.Random(value).randbytes(self.ballast_bytes)

    def train(self) -> int:
        self.commands.run.wait()
        if self.commands.late:
            return protocol.DRAINED
        self.say(Stage("train"))
        self.trail("started", self.step, self.value)
        while self.step < self.max_steps:
            self._misbehave()
            time.sleep(self.step_s)
            if self.commands.late:
                self.checkpoint()
                return protocol.DRAINED
            self.step += 1
            self.value = hashlib.sha256(f"{self.value}{self.step}".encode()).hexdigest()
            self.trail("step", self.step, self.value)
            self.say(Progress(self.step, self.max_steps, 100.0, (self.max_steps - self.step) * self.step_s))
            self.say(Metrics(self.step, {"loss": int(self.value[:8], 16) / 2**32}))
            leave = self.commands.leave
            if leave or self.step % self.save_steps == 0:
                self.checkpoint()
            if leave:
                return protocol.DRAINED
        return self.export()

    def merge(self) -> int:
        self.commands.run.wait()
        self.say(Stage("export"))
        while self.step < self.max_steps:
            self._misbehave()
            time.sleep(self.step_s)
            if self.commands.leave:
                return protocol.DRAINED
            self.step += 1
            self.say(Progress(self.step, self.max_steps))
        for form in self.spec.job["export"]:
            self._write(form, self.value + form, "model.safetensors", "config.json")
        self.say(Result({"merged": self.spec.job["export"], "shrink": self.spec.shrink}))
        return protocol.DONE

    def checkpoint(self) -> None:
        target = self.folder / "checkpoints" / f"step-{self.step:08d}"
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        files = {"state.json": json.dumps({"step": self.step, "value": self.value}).encode()}
        if self.ballast_bytes:
            files["ballast.bin"] = self._ballast(self.value)
        for name, body in files.items():
            (partial / name).write_bytes(body)
        listed = {
            name: {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)} for name, body in files.items()
        }
        manifest = {"step": self.step, "config_hash": self.spec.config_hash, "files": listed}
        (partial / protocol.MANIFEST_FILE).write_text(json.dumps(manifest))
        partial.rename(target)
        self.say(Checkpoint(self.step, str(target.relative_to(self.folder))))

    def export(self) -> int:
        self.say(Stage("export"))
        if self.spec.job["method"] == "full":
            self._write("model", self.value, "model.safetensors", "config.json")
        else:
            self._write("adapter", self.value, "adapter_model.safetensors", "adapter_config.json")
        self.trail("finished", self.step, self.value)
        facts = {"shrink": self.spec.shrink, "pid": os.getpid(), "claimed_at": self.spec.claimed_at}
        facts["cache"] = asdict(self.spec.cache) if self.spec.cache else None
        self.say(Result({"final": self.value, "environment": dict(os.environ), **facts}))
        if self.fault == "late":
            os.kill(os.getpid(), signal.SIGKILL)
        return protocol.DONE

    def _write(self, folder: str, value: str, weights: str, config: str) -> None:
        result = self.folder / "out" / folder
        result.mkdir(parents=True)
        (result / weights).write_text(value)
        (result / config).write_text(json.dumps({"base_model_name_or_path": self.spec.base.id}))

    def _misbehave(self) -> None:
        if self.step + 1 != self.fault_at or self.spec.attempt > self.fault_attempts + 1:
            return
        if self.fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self.fault == "odd_words":
            self.say(Note("trainer.said", "a NUL \0 and half a character \ud83d", data={"row": "\0 \ud83d"}))
        elif self.fault == "orphan":
            # A loader process that outlives the trainer, and holds its output open.
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], stdin=subprocess.DEVNULL)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "hang":
            while True:
                time.sleep(60)
        elif self.fault in FAULTS:
            code, word = FAULTS[self.fault]
            self.say(Failed(word, f"The trainer was told to end with {word}."))
            sys.exit(code)


def main() -> int:
    """Run the attempt in the folder of the arguments, and those that follow."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    commands, folder = Commands(), Path(sys.argv[1])
    while True:
        run = Run(folder, commands)
        code = attempt(run)
        if code != protocol.DONE or not run.stays:
            return code
        commands.rest()
        run.say(Idle())
        folder = commands.next.get()


def attempt(run: Run) -> int:
    """Take a run to its end and return the exit code."""
    try:
        return run.merge() if run.spec.adapter else run.train()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        run.say(Failed("disk_full", "The worker's disk is full."))
        return protocol.DISK_FULL


if __name__ == "__main__":
    sys.exit(main())
