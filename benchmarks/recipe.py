"""`python -m benchmarks.recipe`: the classic comparison of fine-tuning methods, measured through the trainer child.

Full fine-tuning, LoRA in 16 bit, QLoRA, and QLoRA with gradient checkpointing, at 4 x 4 rows of at most 1,024 tokens.
The last of these is what `POST /jobs` does by default; packing and "auto" follow. Each row is a run of its own on the
same rows of a base with random weights, which say nothing about quality. "Does not fit" is a result, with the memory
held when it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.child import drive, write_run
from worker.trainer import protocol
from worker.trainer.prepare import versions
from worker.trainer.protocol import Failed, Progress, Result

_GIB = 2**30
_BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_length": 1024}
_AUTO = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "optim", "packing")
_PLAIN = {"optim": "adamw_torch_fused", "gradient_checkpointing": False}
ROWS: dict[str, dict[str, Any]] = {
    "full fine-tune, AdamW": {"method": "full", "hyperparameters": _PLAIN},
    "LoRA, 16 bit": {"method": "lora", "hyperparameters": _PLAIN},
    "QLoRA": {"hyperparameters": _PLAIN | {"optim": "paged_adamw_8bit"}},
    "QLoRA + gradient checkpointing": {"hyperparameters": {"optim": "paged_adamw_8bit"}},
    "Tunery's defaults, packing": {"hyperparameters": {"packing": True}},
    "everything auto": {"hyperparameters": dict.fromkeys(_AUTO, "auto")},
}


@dataclass(frozen=True)
class Line:
    """One row of the table. `weights_bytes`: of the loaded model; `peak_bytes`: what CUDA's allocator reserved."""

    name: str
    exit_code: int
    weights_bytes: int | None
    peak_bytes: int | None
    trainable: int | None
    tokens_per_s: float | None
    error: str | None


def measure(name: str, body: dict[str, Any], base: Path, folder: Path, steps: int, num_rows: int) -> Line:
    """Run one row in `folder` and remove what it wrote."""
    asked = body | {"hyperparameters": _BATCH | {"max_steps": steps, "save_steps": 10_000, "logging_steps": 1}
                    | body.get("hyperparameters", {})}  # fmt: skip
    print(f"== {name}", flush=True)
    write_run(folder, base, asked, num_rows)
    code, said = drive(folder)
    shutil.rmtree(folder)
    report = next((message.report for message in said if isinstance(message, Result)), {})
    error = next((message.message for message in said if isinstance(message, Failed)), None)
    # The rate over the last twenty steps, so that the first ones, which compile and allocate, are left out.
    rate = next((message.tokens_per_s for message in reversed(said) if isinstance(message, Progress)), None)
    weights = sum(report["precision"]["bytes"].values()) if report else None
    return Line(name, code, weights, report.get("peak_memory_bytes"), report.get("trainable_parameters"), rate, error)


def table(lines: list[Line]) -> str:
    """Return the lines as a Markdown table; speed relative to LoRA in 16 bit."""
    yardstick = next((line.tokens_per_s for line in lines if line.name == "LoRA, 16 bit"), None)
    rows = ["| | weights GiB | training GiB | trainable | tokens/s | to LoRA |", "|---|---|---|---|---|---|"]
    return "\n".join([*rows, *(_row(line, yardstick) for line in lines)])


def _row(line: Line, yardstick: float | None) -> str:
    if line.exit_code == protocol.OUT_OF_MEMORY:
        return f"| {line.name} | | does not fit: {line.error} | | | |"
    if line.exit_code != protocol.DONE or not line.tokens_per_s:
        return f"| {line.name} | | failed: {line.error} | | | |"
    relative = f"{line.tokens_per_s / yardstick:.2f}" if yardstick else ""
    return (f"| {line.name} | {_gib(line.weights_bytes)} | {_gib(line.peak_bytes)} | {line.trainable:,} | "
            f"{line.tokens_per_s:,.0f} | {relative} |")  # fmt: skip


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / _GIB:.1f}"


def main() -> int:
    """Measure every row, print the table, and write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama3-8b" if cuda else "tiny")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--only", action="append", choices=ROWS, help="measure this row; may be repeated")
    parser.add_argument("--out", type=Path, help="write the measurements as JSON")
    chosen = parser.parse_args()
    base = shapes.build(chosen.folder / chosen.shape, chosen.shape, device="cuda" if cuda else "cpu")
    lines = []
    for index, (name, body) in enumerate(ROWS.items()):
        if chosen.only and name not in chosen.only:
            continue
        folder = (chosen.folder / f"recipe-{os.getpid()}-{index}").resolve()
        lines.append(measure(name, body, base, folder, chosen.steps, 16 * chosen.steps + 64))
        if chosen.out:
            chosen.out.write_text(json.dumps(facts(chosen, lines), indent=1) + "\n")
    print(table(lines))
    return 0 if all(line.exit_code in (protocol.DONE, protocol.OUT_OF_MEMORY) for line in lines) else 1


def facts(chosen: argparse.Namespace, lines: list[Line]) -> dict[str, Any]:
    """Return what the table rests on: the card, the versions, every line."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"card": card, "shape": chosen.shape, "steps": chosen.steps, "weights": "random", "versions": versions(),
            "lines": [asdict(line) for line in lines]}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
