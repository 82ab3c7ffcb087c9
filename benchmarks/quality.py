"""`python -m benchmarks.quality`: what products in 8-bit floats do to the loss of a real model.

Trains SmolLM2-135M-Instruct, whose weights are real, on the demo's rows by the fast path, with and without `fp8`, once
for each seed, and evaluates on rows held out. On a CPU the 8-bit products are the rounded ones of
`worker/ml/kernels/torch_eight_bit.py`, added up in fp32. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.child import drive, write_spec
from common.embedded.base_model import ensure_base
from worker.trainer import protocol
from worker.trainer.protocol import Metrics

_ROWS = Path("examples/support-bot.jsonl")
_JOB = {"kernels": "fused", "max_length": 128, "learning_rate": 5e-4, "logging_steps": 1, "eval_steps": 10_000}


def measure(base: Path, folder: Path, steps: int, seed: int, *, fp8: bool) -> dict[str, Any]:
    """Train once and return its losses."""
    (folder / "dataset").mkdir(parents=True)
    lines = _ROWS.read_text().splitlines(keepends=True)
    # Every eighth row is held out.
    (folder / "dataset" / "train.jsonl").write_text("".join(line for at, line in enumerate(lines) if at % 8))
    (folder / "dataset" / "validation.jsonl").write_text("".join(lines[::8]))
    job = {
        "validation_dataset": "dataset:ds_1",
        "seed": seed,
        "lora": {"target_modules": "all-linear"},
        "hyperparameters": _JOB | {"max_steps": steps, "fp8": fp8},
    }
    write_spec(folder, base, job)
    code, said = drive(folder)
    if code != protocol.DONE:
        raise RuntimeError(f"the run ended with exit code {code}: {said[-1]}")
    seen = [message for message in said if isinstance(message, Metrics)]
    losses = [message.values["loss"] for message in seen if message.kind == "train"]
    held_out = [message.values["loss"] for message in seen if message.kind == "eval"]
    return {"seed": seed, "fp8": fp8, "first": losses[0], "last": mean(losses[-5:]), "held_out": held_out[-1]}


def main() -> int:
    """Train, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    chosen = parser.parse_args()
    base = ensure_base(chosen.folder)
    found = []
    for seed in range(chosen.seeds):
        for fp8 in (False, True):
            folder = (chosen.folder / f"quality-{time.time_ns()}").resolve()
            found.append(measure(base, folder, chosen.steps, seed, fp8=fp8))
            shutil.rmtree(folder)
    print("| seed | products | first loss | last 5 steps | held out |\n|---|---|---|---|---|")
    for run in found:
        print(f"| {run['seed']} | {'8-bit floats' if run['fp8'] else 'as held'} | {run['first']:.4f} "
              f"| {run['last']:.4f} | {run['held_out']:.4f} |")  # fmt: skip
    facts = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv[1:], "steps": chosen.steps,
             "versions": {name: version(name) for name in ("torch", "transformers")}, "runs": found}  # fmt: skip
    chosen.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
