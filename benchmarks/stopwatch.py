"""Measures the steps of a training run after its warm-up: real tokens a second, and the card's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Stopwatch(TrainerCallback):
    """Times the steps from `first` (not included) to `last`; `tokens` says how many were trained on so far."""

    def __init__(self, first: int, last: int, tokens: Callable[[], int]):
        self._steps = first, last
        self._tokens = tokens
        self._marks: list[tuple[float, int]] = []
        self.memory: dict[str, int] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time where the measurement begins and ends."""
        if state.global_step not in self._steps:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.memory = {
                "allocated_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        self._marks.append((time.perf_counter(), self._tokens()))

    def result(self) -> dict[str, Any]:
        """Return what was measured."""
        (begun, before), (ended, after) = self._marks
        return {
            "tokens_per_s": round((after - before) / (ended - begun), 1),
            "tokens_per_step": round((after - before) / (self._steps[1] - self._steps[0])),
            "seconds": round(ended - begun, 3),
            **self.memory,
        }
