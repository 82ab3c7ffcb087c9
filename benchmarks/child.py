"""`python -m benchmarks.child`: the trainer child, as a supervisor drives it, on a base of a real shape.

Feeds it the body of `POST /jobs` with its defaults and prints speed (real tokens only), memory and the adapter's files.
Needs no database, broker or store.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from common.schemas.jobs import JobSpec
from worker.trainer import protocol
from worker.trainer.protocol import BaseRef, Failed, Message, Metrics, Note, Result, TrainSpec


def write_run(folder: Path, base: Path, job: dict[str, Any], num_rows: int, **lengths: Any) -> None:
    """Lay out the folder of a run in `folder`; `lengths` are those of `shapes.chat_rows`."""
    (folder / "dataset").mkdir(parents=True)
    shapes.write_rows(folder / "dataset" / "train.jsonl", num_rows, **lengths)
    write_spec(folder, base, job)


def write_spec(folder: Path, base: Path, job: dict[str, Any]) -> None:
    """Lay out the spec of a run in `folder`, whose datasets are there already."""
    frozen = JobSpec.model_validate({"model": base.name, "dataset": "dataset:ds_0"} | job).model_dump(mode="json")
    held_out = "dataset/validation.jsonl" if "validation_dataset" in job else None
    TrainSpec("job_benchmark", 1, frozen, BaseRef(str(base.resolve()), f"benchmark/{base.name}"),
              "dataset/train.jsonl", "0" * 64, validation_file=held_out).write(folder)  # fmt: skip


def drive(folder: Path) -> tuple[int, list[Message]]:
    """Run the child in `folder` and return its exit code and what it said."""
    process = subprocess.Popen([sys.executable, "-m", "worker.trainer", str(folder)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"do": "run"}).encode() + b"\n")
    process.stdin.flush()
    said = []
    for line in process.stdout:
        said.append(protocol.decode(line))
        if isinstance(said[-1], Note | Metrics | Failed):
            print(said[-1], flush=True)
    return process.wait(), said


def main() -> int:
    """Build the base, run the child, print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--shape", choices=shapes.SHAPES, help="default: llama3-8b on a GPU, tiny without one")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--job", type=json.loads, default={}, help="JSON laid over the body of POST /jobs")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = chosen.shape or ("llama3-8b" if device == "cuda" else "tiny")
    base = shapes.build(chosen.folder / shape, shape, device=device)
    print(f"base ready after {time.monotonic() - started:.0f} s", flush=True)
    run = (chosen.folder / f"run-{time.time_ns()}").resolve()
    write_run(run, base, chosen.job, chosen.rows)
    code, said = drive(run)
    files = {path.name: path.stat().st_size for path in sorted((run / "out").rglob("*")) if path.is_file()}
    reports = [message.report for message in said if isinstance(message, Result)]
    answer = {"exit_code": code, "report": reports[0] if reports else None, "files": files}
    text = json.dumps(answer, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
