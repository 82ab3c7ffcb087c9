"""`python -m benchmarks.warm`: how soon a job takes its first step, in a new process and in one that holds its base.

Drives the trainer child by its protocol, over a base of a real shape with random weights and a few rows, so that the
preparation of data is of no weight. Needs no database, broker or store. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.child import write_run
from worker.trainer import protocol
from worker.trainer.protocol import Failed, Idle, Message, Progress, Result, TrainSpec

# bitsandbytes 0.50 never frees the pages of an optimizer, so a process that has some does not stay.
_HYPERPARAMETERS = {"max_steps": 3, "logging_steps": 1, "optim": "adamw_torch_fused"}


@dataclass(frozen=True)
class Measured:
    """One job. Seconds from the moment at which the trainer was started or given the run; bytes of the card."""

    name: str
    base_from: str
    first_step_s: float
    prepare_s: float
    whole_s: float
    idle_s: float
    peak_bytes: int
    held_bytes: int
    adapter_sha256: str


class Trainer:
    """A trainer process."""

    def __init__(self, folder: Path):
        self._process = subprocess.Popen([sys.executable, "-m", "worker.trainer", str(folder)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)  # fmt: skip
        self._said = self._listen()

    def _listen(self) -> Iterator[Message]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield protocol.decode(line)

    def give(self, folder: Path) -> None:
        """Give the process that waits another run."""
        assert self._process.stdin is not None
        command = {"do": "run", "folder": str(folder), "monotonic": time.monotonic() + 600}
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def measure(self, name: str, folder: Path, begun: float) -> Measured:
        """Hear the present run until the process waits again."""
        first = done = 0.0
        report: dict[str, Any] = {}
        for message in self._said:
            if isinstance(message, Failed):
                raise RuntimeError(message.message)
            if isinstance(message, Progress) and message.step >= 1 and not first:
                first = time.monotonic()
            if isinstance(message, Result):
                done, report = time.monotonic(), message.report
            if isinstance(message, Idle):
                break
        adapter = folder / "out" / "adapter" / "adapter_model.safetensors"
        return Measured(
            name, report["base_from"], first - begun, report["seconds"]["prepare"], done - begun,
            time.monotonic() - done, report["peak_memory_bytes"], used_bytes(),
            hashlib.sha256(adapter.read_bytes()).hexdigest(),
        )  # fmt: skip

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def used_bytes() -> int:
    """Return what all processes together hold on the card; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


def lay_out(folder: Path, base: Path, rows: int, **job: Any) -> Path:
    """Lay out a run after which the process may stay."""
    write_run(folder, base, {"hyperparameters": _HYPERPARAMETERS} | job, rows)
    replace(TrainSpec.read(folder), keep=True).write(folder)
    return folder


def measure(folder: Path, base: Path, rows: int, jobs: int) -> list[Measured]:
    """Measure one job in a new process, and others in the same process after it, of which each second has other
    adapters."""
    begun = time.monotonic()
    first = lay_out(folder / "job0", base, rows)
    trainer = Trainer(first)
    try:
        found = [trainer.measure("new process", first, begun)]
        for count in range(1, jobs + 1):
            other = {"lora": {"r": 8, "target_modules": "all-linear"}} if count % 2 else {}
            run = lay_out(folder / f"job{count}", base, rows, **other)
            begun = time.monotonic()
            trainer.give(run)
            found.append(trainer.measure("other adapters" if other else "the same job", run, begun))
    finally:
        trainer.end()
    return found


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.warm", *sys.argv[1:]])


def main() -> int:
    """Build the base, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--shape", choices=shapes.SHAPES, help="default: llama3-8b on a GPU, tiny without one")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/warm.json"))
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = chosen.shape or ("llama3-8b" if device == "cuda" else "tiny")
    base = shapes.build(chosen.folder / shape, shape, device=device)
    folder = (chosen.folder / f"warm-{time.time_ns()}").resolve()
    before = used_bytes()
    found = measure(folder, base, chosen.rows, chosen.jobs)
    after = used_bytes()
    shutil.rmtree(folder)
    print("| job | base from | first step s | of it prepare s | whole s | clearing up s | peak GiB | held after GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for item in found:
        print(f"| {item.name} | {item.base_from} | {item.first_step_s:.2f} | {item.prepare_s:.2f} | {item.whole_s:.2f} "
              f"| {item.idle_s:.2f} | {item.peak_bytes / 2**30:.2f} | {item.held_bytes / 2**30:.2f} |")  # fmt: skip
    same = len({item.adapter_sha256 for item in found if item.name != "other adapters"}) == 1
    print(f"the same job gave the same bytes each time: {same}; the card after the process: {after / 2**30:.2f} GiB")
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    answer = {"when": time.strftime("%Y-%m-%d"), "machine": card, "shape": shape, "command": _command(),
              "same_bytes": same, "before_bytes": before, "after_bytes": after,
              "jobs": [asdict(item) for item in found]}  # fmt: skip
    chosen.out.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
