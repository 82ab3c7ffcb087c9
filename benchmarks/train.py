"""`python -m benchmarks.train`: how fast a job trains, against the classic recipe and what a user could pick instead.

One card, one run, the same rows, 16 rows to an optimizer step (the others: as many tokens as 16 rows have on average).
The main table has rows of chat lengths and LoRA of rank 16 on q, k, v and o; the classic recipe is measured before and
after. `--table short`, `full` and `linear` compare lean and classic on other rows and on all linear layers. Random
weights say nothing about quality. The equality gate is `tests/gpu/test_kernels_gpu.py`, run first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.child import write_run

_GIB = 2**30
ROWS_A_STEP = 16
_EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CLASSIC = {"kernels": "plain", "optim": "paged_adamw_8bit", "gradient_checkpointing": True, "group_by_length": True}
_FAST = {"kernels": "auto", "optim": "auto", "gradient_checkpointing": "auto", "group_by_length": False}
ARMS: dict[str, dict[str, Any]] = {
    "classic": {"hyperparameters": _CLASSIC},
    "lora16": {
        "method": "lora",
        "hyperparameters": _CLASSIC | {"optim": "adamw_torch_fused", "gradient_checkpointing": False},
    },
    "lean": {"hyperparameters": _FAST | {"max_memory_gib": 22.0}},
    "lean, classic's order": {"hyperparameters": _FAST | {"max_memory_gib": 22.0, "group_by_length": True}},
    "small": {"hyperparameters": _FAST | {"max_memory_gib": 10.0}},
    "roomy": {"hyperparameters": _FAST},
    "lean, fp8": {"hyperparameters": _FAST | {"max_memory_gib": 22.0, "fp8": True}},
    "roomy, fp8": {"hyperparameters": _FAST | {"fp8": True}},
    "default": {"hyperparameters": {}},
}
# What is no job of Tunery's, and its longest sequence in tokens: as many as a step has where there is no figure.
STOCK: dict[str, int | None] = {"classic, stock": 1024, "trl": None, "unsloth": None, "unsloth, 16k tokens": 16_384}
# Rows by their median length in words, how far that spreads, and the longest; the arms of each table, in order.
_CHAT = {"mean": 5.4, "spread": 0.6, "most": 900}
TABLES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "main": (_CHAT, {}, ["classic", "lean", "classic", "classic, stock", "unsloth", "unsloth, 16k tokens", "small",
                         "roomy", "lean, fp8", "roomy, fp8", "lora16", "default", "lean, classic's order", "trl"]),
    "short": ({"mean": 3.7, "spread": 0.4, "most": 200}, {}, ["lean", "classic"]),
    "full": ({"mean": 9.0, "spread": 0.1, "most": 2000}, {}, ["lean", "classic"]),
    "linear": (_CHAT, {"lora": {"target_modules": _EVERYWHERE}}, ["lean", "classic"]),
}  # fmt: skip


def body_of(arm: str, first: int, last: int) -> dict[str, Any]:
    """Return what an arm asks for, but for model and data. It is measured from `first` to `last`, its last step.

    The tokens of a step are known once it was logged, so both are.
    """
    body = ARMS.get(arm, {})
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_length": 1024,
                "max_steps": last, "save_steps": 10_000, "logging_steps": first}  # fmt: skip
    return body | {"hyperparameters": settings | body.get("hyperparameters", {})}


def measure(arm: str, table: str, chosen: argparse.Namespace, base: Path, tokens: int) -> dict[str, Any]:
    """Run one arm in a process of its own and return what it measured, or why it did not."""
    rows, extra, _ = TABLES[table]
    folder = (chosen.folder / f"run-{time.time_ns()}").resolve()
    first, last = chosen.warm_up, chosen.warm_up + chosen.timed
    asked = extra | body_of(arm, first, last)
    write_run(folder, base if asked.get("method") != "lora" else _whole(base), asked, ROWS_A_STEP * last, **rows)
    out = folder / "measured.json"
    if arm in STOCK:
        width = STOCK[arm] or tokens
        data = folder / "dataset" / "train.jsonl"
        shapes.write_rows(data, ROWS_A_STEP * last * -(-width // tokens) + 64, **rows)
        command = ["benchmarks.stock", arm.split(",")[0], str(_whole(base).resolve()), str(data), str(first), str(last),
                   str(width), str(out)]  # fmt: skip
    else:
        command = ["benchmarks.arm", str(folder), str(first), str(last), str(out)]
    begun = time.monotonic()
    with (chosen.folder / "log.txt").open("ab") as log:
        log.write(f"\n== {table}: {arm}\n".encode())
        log.flush()
        try:
            subprocess.run([sys.executable, "-m", *command], env=_environment(arm), stdout=log, stderr=log, check=False,
                           timeout=chosen.limit)  # fmt: skip
            found = json.loads(out.read_text()) if out.exists() else {"error": "it ended early; see log.txt"}
        except subprocess.TimeoutExpired:
            found = {"error": f"not done in {chosen.limit} s"}
    shutil.rmtree(folder)
    return {"table": table, "arm": arm, "total_s": round(time.monotonic() - begun, 1)} | found


def _environment(arm: str) -> dict[str, str]:
    # What the supervisor gives a trainer; Unsloth's packages come before the others.
    paths = [os.environ.get("TUNERY_UNSLOTH_SITE", "")] if arm.startswith("unsloth") else []
    path = os.pathsep.join([str(Path.cwd()), *paths, os.environ.get("PYTHONPATH", "")])
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _whole(base: Path) -> Path:
    # The 16-bit folder beside the one in 4 bit.
    return base.with_name(base.name.removesuffix("-nf4"))


def gate(folder: Path) -> bool:
    """Return whether the fast path's gradients are those of eager layers in fp32, and the broken ones are not."""
    if not torch.cuda.is_available():
        command = ["tests/worker/trainer/test_kernels.py", "-k", "gate"]
    else:
        # Without the servers that other tests start, whose packages a card's machine need not have.
        command = ["--noconftest", "tests/gpu/test_kernels_gpu.py"]
    with (folder / "log.txt").open("ab") as log:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *command],
                              env=_environment("gate"), stdout=log, stderr=log, check=False)  # fmt: skip
    return done.returncode == 0


def render(lines: list[dict[str, Any]]) -> str:
    """Return the lines as Markdown; ratios to the mean of the classic recipe's runs on the same rows."""
    text = ["| rows | arm | tokens a step | tokens/s | to classic | allocated GiB | reserved GiB |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for line in lines:
        if "tokens_per_s" not in line:
            text.append(f"| {line['table']} | {line['arm']} | | {line.get('error')} | | | |")
            continue
        same = [other for other in lines if other["table"] == line["table"] and other["arm"] == "classic"]
        classic = [other["tokens_per_s"] for other in same if "tokens_per_s" in other]
        ratio = f"{line['tokens_per_s'] * len(classic) / sum(classic):.2f}" if classic else ""
        memory = [f"{line[name] / _GIB:.1f}" if name in line else "" for name in ("allocated_bytes", "reserved_bytes")]
        text.append(f"| {line['table']} | {line['arm']} | {line['tokens_per_step']:,} | {line['tokens_per_s']:,.0f} | "
                    f"{ratio} | {memory[0]} | {memory[1]} |")  # fmt: skip
    return "\n".join(text)


def main() -> int:
    """Build the base, pass the gate, measure the arms, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama3-8b" if cuda else "tiny")
    parser.add_argument("--table", action="append", choices=TABLES, help="default: main; may be repeated")
    parser.add_argument("--arm", action="append", help="measure this arm only; may be repeated")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--timed", type=int, default=15)
    parser.add_argument("--limit", type=int, default=150, help="seconds for an arm")
    parser.add_argument("--budget", type=int, default=570, help="seconds for all; arms that would begin later do not")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train.json"))
    chosen = parser.parse_args()
    begun = time.monotonic()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "benchmarks.shapes", str(chosen.folder), chosen.shape],
                   env=_environment("base"), check=True)  # fmt: skip
    print(f"base ready after {time.monotonic() - begun:.0f} s", flush=True)
    passed = gate(chosen.folder)
    print(f"gate {'passed' if passed else 'FAILED'} after {time.monotonic() - begun:.0f} s", flush=True)
    lines: list[dict[str, Any]] = []
    base = chosen.folder / (f"{chosen.shape}-nf4" if cuda else chosen.shape)
    for table in chosen.table or ["main"]:
        tokens = shapes.mean_tokens(chosen.folder / chosen.shape, ROWS_A_STEP, 1024, **TABLES[table][0])
        for arm in TABLES[table][2]:
            if (chosen.arm and arm not in chosen.arm) or time.monotonic() - begun > chosen.budget - 30:
                continue
            lines.append(measure(arm, table, chosen, base, tokens))
            print({name: value for name, value in lines[-1].items() if name != "versions"}, flush=True)
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(json.dumps(facts(chosen, lines, passed=passed), indent=1) + "\n")
    print(render(lines))
    return 0 if passed and all("tokens_per_s" in line for line in lines) else 1


def facts(chosen: argparse.Namespace, lines: list[dict[str, Any]], *, passed: bool) -> dict[str, Any]:
    """Return what the table rests on."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "card": card, "command": sys.argv[1:],
            "shape": chosen.shape, "weights": "random", "warm_up": chosen.warm_up, "timed": chosen.timed,
            "gate_passed": passed, "lines": lines}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
