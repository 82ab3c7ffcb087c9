"""`python -m benchmarks.preflight`: how long the check of a large dataset takes, and how much memory.

Writes files of short rows of each kind and runs the preflight child on them as its worker does, with the demo's
tokenizer and the default limit of memory. No GPU, database or store.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.embedded.base_model import ensure_base
from common.schemas.jobs import JobSpec
from common.settings import Settings
from worker.child import Child
from worker.trainer.protocol import BaseRef, Result, TrainSpec, decode

_WORDS = "the of and to in is that it was for on are with as his they be at one have this from by hot but what some"
_WORDS += " we can out other were all there when up use your how said an each she which do their time if will way many"
_VOCABULARY = _WORDS.split()
_FOREIGN_WORDS = "für über schön größer première façade où être niño mañana привет мир дом 東京 世界 안녕 שלום"
_FOREIGN = _FOREIGN_WORDS.split()


def _sentence(source: random.Random, num_words: int) -> str:
    return " ".join(source.choices(_VOCABULARY, k=num_words))


def _chat(source: random.Random, number: int) -> dict[str, Any]:
    question, answer = f"{number}: {_sentence(source, 12)}?", f"{_sentence(source, 16)}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _foreign(source: random.Random, number: int) -> dict[str, Any]:
    question, answer = (" ".join(source.choices(_FOREIGN, k=count)) for count in (12, 16))
    turns = [{"role": "user", "content": f"{number}: {question}?"}, {"role": "assistant", "content": f"{answer}."}]
    return {"messages": turns}


def _turns(source: random.Random, number: int) -> dict[str, Any]:
    first, second = (_chat(source, number)["messages"] for _ in range(2))
    return {"messages": [{"role": "system", "content": _sentence(source, 8)}, *first, *second]}


def _pair(source: random.Random, number: int) -> dict[str, Any]:
    return {"prompt": f"{number}: {_sentence(source, 12)}?", "completion": f" {_sentence(source, 16)}."}


def _text(source: random.Random, number: int) -> dict[str, Any]:
    return {"text": f"{number}: {_sentence(source, 28)}."}


KINDS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "chat": _chat, "chat of 5 turns": _turns, "chat, not English": _foreign,
    "prompt and completion": _pair, "text": _text,
}  # fmt: skip


def write_run(folder: Path, base: Path, kind: str, num_rows: int) -> int:
    """Lay out the folder of a check with so many rows and return the size of its file in bytes."""
    (folder / "dataset").mkdir(parents=True, exist_ok=True)
    path, source = folder / "dataset" / "train.jsonl", random.Random(0)
    with path.open("w") as file:
        file.writelines(json.dumps(KINDS[kind](source, number)) + "\n" for number in range(num_rows))
    frozen = JobSpec(model=base.name, dataset="dataset:ds_0").model_dump(mode="json")
    ref = BaseRef(str(base.resolve()), f"benchmark/{base.name}")
    TrainSpec("job_benchmark", 1, frozen, ref, "dataset/train.jsonl", "0" * 64, device="cpu").write(folder)
    return path.stat().st_size


@dataclass(frozen=True)
class Measured:
    """What a check took: seconds by the clock and of the processors, the peak of its processes' memory, its report."""

    seconds: float
    cpu_s: float
    peak_bytes: float
    report: dict[str, Any]


def run_check(folder: Path) -> Measured:
    """Run one check and measure it."""
    limit = Settings().preflight_memory_bytes
    used_before = _cpu_s()
    child = Child(["worker.trainer.check", str(folder)], folder, decode, address_space_bytes=limit)
    started, peak = time.monotonic(), 0.0
    while not child.ended:
        peak = max(peak, _group_bytes(child.pid))
        time.sleep(0.2)
    seconds = time.monotonic() - started
    child.wait()
    said = list(iter(child.messages.get, None))
    assert said and isinstance(said[-1], Result), (said, child.log_tail())
    return Measured(seconds, _cpu_s() - used_before, peak, said[-1].report)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _group_bytes(group: int) -> float:
    """Return the resident memory of a process group, shared pages counted in parts (PSS)."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                rollup = (folder / "smaps_rollup").read_text()
                total += 1024 * float(rollup.partition("Pss:")[2].split()[0])
        except (OSError, IndexError, ProcessLookupError):
            continue
    return total


def main() -> int:
    """Check a file of each kind and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    chosen = parser.parse_args()
    base = ensure_base(chosen.folder)
    print(f"{os.cpu_count()} cores, {chosen.rows:,} rows each\n")
    print(f"{'rows of':24} {'file':>8} {'tokens':>13} {'seconds':>8} {'CPU s':>7} {'rows/s':>8} {'memory':>8}")
    for kind in chosen.kinds:
        run = (chosen.folder / f"preflight-{os.getpid()}").resolve()
        size = write_run(run, base, kind, chosen.rows)
        found = run_check(run)
        print(f"{kind:24} {size / 1e6:5.0f} MB {found.report['tokens']:13,} {found.seconds:8.1f} {found.cpu_s:7.1f} "
              f"{chosen.rows / found.seconds:8,.0f} {found.peak_bytes / 1e6:5.0f} MB", flush=True)  # fmt: skip
        shutil.rmtree(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
