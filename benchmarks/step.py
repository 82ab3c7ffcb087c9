"""`python -m benchmarks.step`: where the time of a training step goes on the card.

Runs one arm of `benchmarks.train` and traces a few of its steps with torch's profiler. Prints the share of each family
of kernels, and how long the card waited for the host; `--trace` keeps the trace, for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks import shapes
from benchmarks.arm import run_with
from benchmarks.child import write_run
from benchmarks.train import ARMS, ROWS_A_STEP, body_of
from worker.trainer import protocol
from worker.trainer.protocol import Message
from worker.trainer.run import Run

# The first family whose pattern a kernel's name matches.
FAMILIES = (
    ("attention", r"flash|fmha|cudnn.*attn|sdpa"),
    ("dequantisation", r"^_dequantize|kDequantize|^_narrow_(weights|turned)"),
    ("rounding to 8 bit", r"^_narrow$"),
    ("SwiGLU", r"^_swiglu"),
    ("norms", r"^_norm|^_apply"),
    ("rotation", r"^_rotate"),
    ("LoRA with dropout", r"^_down|^_add_up"),
    ("cross-entropy", r"^_cross_entropy"),
    ("optimizer", r"multi_tensor|adam|kOptimizer"),
    ("products", r"gemm|nvjet|cutlass|splitK"),
    ("copies", r"memcpy|memset|copy|CatArray|fill"),
)
_ON_CARD = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Tracer(TrainerCallback):
    """Traces the steps after `first`, up to and with `last`."""

    def __init__(self, first: int, last: int, path: Path, tokens: Callable[[], int]):
        self._steps = first, last
        self._path = path
        self._tokens = tokens
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.tokens_per_step = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin, or end and write the trace."""
        first, last = self._steps
        if state.global_step == first:
            torch.cuda.synchronize()
            self.tokens_per_step = -self._tokens()
            self._profile.start()
        elif state.global_step == last:
            torch.cuda.synchronize()
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._path))
            self.tokens_per_step = round((self.tokens_per_step + self._tokens()) / (last - first))


def summarize(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Return milliseconds a step of each family and of waiting, and the calls in which the host waited."""
    card = sorted((event["ts"], event["ts"] + event["dur"], event["name"]) for event in events
                  if event.get("cat") in _ON_CARD)  # fmt: skip
    if not card:
        raise RuntimeError("the trace holds nothing of a card")
    families, names = Counter[str](), Counter[str]()
    busy, end, gaps = 0.0, card[0][0], list[tuple[float, str, str]]()
    before = ""
    for begun, ended, name in card:
        families[family_of(name)] += ended - begun
        names[name] += ended - begun
        if begun > end:
            gaps.append((begun - end, before, name))
        busy += max(0.0, ended - max(begun, end))
        if ended > end:
            end, before = ended, name
    whole = end - card[0][0]
    waits = Counter(event["name"] for event in events if event.get("name") in _WAITS)
    each = 1000 * steps
    return {
        "step_ms": round(whole / each, 2),
        "idle_ms": round((whole - busy) / each, 2),
        "families_ms": {name: round(value / each, 2) for name, value in families.most_common()},
        "kernels_ms": {name[:90]: round(value / each, 2) for name, value in names.most_common(30)},
        "launches": round(len(card) / steps),
        "longest_gaps_ms": [(round(gap / 1000, 2), one[:60], two[:60]) for gap, one, two in sorted(gaps)[:-16:-1]],
        "host_waits": {name: round(count / steps, 1) for name, count in waits.items()},
    }


def family_of(name: str) -> str:
    """Return the family of the kernel `name`."""
    return next((family for family, pattern in FAMILIES if re.search(pattern, name, re.IGNORECASE)), "other")


def main() -> int:
    """Train, trace, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".tunery/bench"))
    parser.add_argument("--shape", choices=shapes.SHAPES, default="llama3-8b")
    parser.add_argument("--arm", choices=ARMS, default="lean")
    parser.add_argument("--first", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trace", type=Path, help="keep the trace here")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    chosen = parser.parse_args()
    base = shapes.build(chosen.folder / chosen.shape, chosen.shape)
    if ARMS[chosen.arm].get("method") != "lora":
        base = shapes.build_nf4(chosen.folder / f"{chosen.shape}-nf4", base)
    last = chosen.first + chosen.steps
    with tempfile.TemporaryDirectory() as temporary:
        folder, path = Path(temporary) / "run", Path(temporary) / "trace.json"
        write_run(folder, base, body_of(chosen.arm, chosen.first, last), ROWS_A_STEP * last)
        tokens = run_traced(folder, chosen.first, last, path)
        found = summarize(json.loads(path.read_text())["traceEvents"], chosen.steps)
        if chosen.trace:
            shutil.copy(path, chosen.trace)
    found = {"date": time.strftime("%Y-%m-%d"), "card": torch.cuda.get_device_name(), "arm": chosen.arm,
             "command": sys.argv[1:], "tokens_per_step": tokens, **found}  # fmt: skip
    print(json.dumps(found, indent=1))
    chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def run_traced(folder: Path, first: int, last: int, path: Path) -> int:
    """Run the job in `folder`, write the trace of its steps after `first` to `path`, return the tokens of a step."""
    tracers, said = list[Tracer](), list[Message]()

    def trace(run: Run) -> Tracer:
        tracers.append(Tracer(first, last, path, lambda: run.counters.tokens))
        return tracers[-1]

    code = run_with(folder, said.append, trace)
    if code != protocol.DONE:
        raise RuntimeError(f"the run ended with exit code {code}: {said[-1]}")
    return tracers[0].tokens_per_step


if __name__ == "__main__":
    sys.exit(main())
