"""`python -m benchmarks.warm`: how soon a job takes its first step.

In a new process that quantises its base (cold), in one that reads it in 4 bit from the disk (cached), and in one that
holds it already (warm). Drives the trainer child by its protocol, over a base of a real shape with random weights and a
few rows, so that the preparation of data is of no weight. Needs no database, broker or store. Prints a table and writes
JSON. Before a new process starts, its files are taken out of the page cache, as on a busy machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.child import write_run
from worker.trainer import protocol
from worker.trainer.protocol import CacheRef, Failed, Idle, Message, Result, TrainSpec

_HYPERPARAMETERS = {"max_steps": 3, "logging_steps": 1}
# A step of a real shape takes a CPU minutes otherwise.
_ON_A_CPU = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 64}
_WORDS = {"mean": 3.5, "spread": 0.3, "most": 60}
_PACKAGES = ("torch", "transformers", "bitsandbytes")
_OTHER = {"lora": {"r": 8, "target_modules": "all-linear"}}


@dataclass(frozen=True)
class Measured:
    """One job. Seconds from the moment at which the trainer was started or given the run; bytes of the card.

    `clearing_s`: from the result to the moment at which the process waits again or is gone; a cold start writes then.
    """

    name: str
    base_from: str
    first_step_s: float
    data_s: float
    base_s: float
    whole_s: float
    clearing_s: float
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

    def measure(self, name: str, folder: Path, begun: float, *, stays: bool) -> Measured:
        """Hear the present run until the process waits again, or is gone where it is not to stay."""
        done, report, idle = 0.0, dict[str, Any](), False
        for message in self._said:
            if isinstance(message, Failed):
                raise RuntimeError(message.message)
            if isinstance(message, Result):
                done, report = time.monotonic(), message.report
            if isinstance(message, Idle):
                idle = True
                break
        if not report or idle != stays:
            raise RuntimeError(f"the trainer {'left' if stays else 'stayed'} after {name} (exit code {self.end()})")
        adapter = folder / "out" / "adapter" / "adapter_model.safetensors"
        return Measured(
            name, report["base_load"]["from"], report["claim_to_first_step_s"], report["data_preparation_s"],
            report["base_load"]["seconds"], done - begun, time.monotonic() - done, report["peak_memory_bytes"],
            used_bytes(), hashlib.sha256(adapter.read_bytes()).hexdigest(),
        )  # fmt: skip

    def end(self) -> int:
        """End the process and return its exit code."""
        self._process.kill()
        return self._process.wait()


def used_bytes() -> int:
    """Return what all processes together hold on the card; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


class Bench:
    """Lays out runs over one base and measures them, in `folder`."""

    def __init__(self, folder: Path, base: Path, rows: int, *, cpu: bool):
        self._folder = folder
        self._base = base
        self._rows = rows
        self._hyperparameters = _HYPERPARAMETERS | (_ON_A_CPU if cpu else {})
        self._lengths = _WORDS if cpu else {}
        self._cache = folder / "quantized"
        self._count = 0

    def _lay_out(self, *, stays: bool, **job: Any) -> tuple[Path, float]:
        self._count += 1
        folder = self._folder / f"job{self._count}"
        write_run(folder, self._base, {"hyperparameters": self._hyperparameters} | job, self._rows, **self._lengths)
        begun = time.monotonic()
        cache = CacheRef(str(self._cache), 1 << 40, 0)
        replace(TrainSpec.read(folder), keep=stays, cache=cache, claimed_at=begun).write(folder)
        return folder, begun

    def cold(self) -> Measured:
        """Measure a job in a new process that has to quantise its base, and writes it into the cache."""
        shutil.rmtree(self._cache, ignore_errors=True)
        forget_files(self._base)
        folder, begun = self._lay_out(stays=False)
        trainer = Trainer(folder)
        try:
            return trainer.measure("cold", folder, begun, stays=False)
        finally:
            trainer.end()

    def cached(self, jobs: int) -> list[Measured]:
        """Measure a job in a new process that finds its base in the cache, and `jobs` more in the same process.

        Every second of those has other adapters.
        """
        forget_files(self._base)
        forget_files(self._cache)
        folder, begun = self._lay_out(stays=True)
        trainer = Trainer(folder)
        try:
            found = [trainer.measure("cached", folder, begun, stays=True)]
            for count in range(1, jobs + 1):
                other = _OTHER if count % 2 else {}
                folder, begun = self._lay_out(stays=True, **other)
                trainer.give(folder)
                found.append(trainer.measure("warm, other adapters" if other else "warm", folder, begun, stays=True))
        finally:
            trainer.end()
        return found

    def entry_bytes(self) -> int:
        """Return what the base takes in the cache."""
        return sum(path.stat().st_size for path in self._cache.rglob("*") if path.is_file())


def forget_files(folder: Path) -> None:
    """Take the files of `folder` out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.warm", *sys.argv[1:]])


def main() -> int:
    """Build the base, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--shape", choices=shapes.SHAPES, help="default: llama3-8b on a GPU, tiny without one")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--starts", type=int, default=2, help="cold starts, and as many cached ones")
    parser.add_argument(
        "--jobs", type=int, default=4, help="jobs in a process that holds its base, after each cached start"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/warm.json"))
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = chosen.shape or ("llama3-8b" if device == "cuda" else "tiny")
    base = shapes.build(chosen.folder / shape, shape, device=device)
    folder = (chosen.folder / f"warm-{time.time_ns()}").resolve()
    before = used_bytes()
    bench = Bench(folder, base, chosen.rows, cpu=device == "cpu")
    try:
        found = [item for _ in range(chosen.starts) for item in (bench.cold(), *bench.cached(chosen.jobs))]
        entry_bytes = bench.entry_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    after = used_bytes()
    same = len({item.adapter_sha256 for item in found if "other" not in item.name}) == 1
    card = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {os.cpu_count()} cores"
    answer = {"when": time.strftime("%Y-%m-%d"), "machine": card, "shape": shape, "command": _command(),
              "load_average": os.getloadavg(), "versions": {name: version(name) for name in _PACKAGES},
              "base_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")), "entry_bytes": entry_bytes,
              "same_bytes": same, "before_bytes": before, "after_bytes": after,
              "jobs": [asdict(item) for item in found]}  # fmt: skip
    _print(found)
    print(f"the base: {answer['base_bytes'] / 1e9:.2f} GB in 16 bit, {entry_bytes / 1e9:.2f} GB in 4 bit")
    print(f"the same job gave the same bytes each time: {same}; the card after the process: {after / 2**30:.2f} GiB")
    chosen.out.write_text(json.dumps(answer, indent=1) + "\n")
    # A card's attention adds gradients in any order, so that equal runs differ in their last bits.
    return 0 if same or device == "cuda" else 1


def _print(found: list[Measured]) -> None:
    columns = ("start", "base from", "first step s", "of it data s", "of it base s", "whole s", "clearing up s",
               "peak GiB", "held after GiB")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for item in found:
        print(f"| {item.name} | {item.base_from} | {item.first_step_s:.2f} | {item.data_s:.2f} | {item.base_s:.2f} "
              f"| {item.whole_s:.2f} | {item.clearing_s:.2f} | {item.peak_bytes / 2**30:.2f} "
              f"| {item.held_bytes / 2**30:.2f} |")  # fmt: skip


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
