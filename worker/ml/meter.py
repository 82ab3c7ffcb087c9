"""What a run counts: tokens and loss of each step, summed on the device, and their sums over the whole run."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepFacts:
    """One optimizer step: mean loss per trained token, and the real tokens in it, without padding."""

    loss: float
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class _Pending:
    # The sums of a step that has been launched, on their way to the host; `ready` where they come from a card.
    sums: torch.Tensor
    ready: torch.cuda.Event | None


class Meter:
    """Adds up the micro-batches of a step on the device, so that the host launches the next step without waiting."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._pending: deque[_Pending] = deque()

    def add(self, loss: torch.Tensor, tokens: torch.Tensor | int, trained: torch.Tensor | int) -> None:
        """Count a micro-batch: its `loss` as a share of the step's mean, its real tokens, and those trained on."""
        values = [_on_device(value, loss.device) for value in (loss.detach(), tokens, trained)]
        sums = torch.stack(values)
        self._sums = sums if self._sums is None else self._sums + sums

    def close(self) -> None:
        """End a step: start to copy its sums to the host."""
        sums, self._sums = self._sums, None
        if sums is None:
            sums = torch.zeros(3, dtype=torch.float64)
        ready = None
        if sums.is_cuda:
            sums = torch.empty(3, dtype=torch.float64, pin_memory=True).copy_(sums, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Pending(sums, ready))

    def settled(self, *, wait: bool) -> list[StepFacts]:
        """Return the steps whose sums have arrived since the last call, in order; with `wait`, all that were closed."""
        found = []
        while self._pending:
            ready = self._pending[0].ready
            if ready is not None and wait:
                ready.synchronize()
            elif ready is not None and not ready.query():
                break
            loss, tokens, trained = self._pending.popleft().sums.tolist()
            found.append(StepFacts(loss, int(tokens), int(trained)))
        return found


def _on_device(value: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    # A number that is copied to a card makes the host wait for it; one that is filled in there does not.
    if isinstance(value, int):
        return torch.full((), value, dtype=torch.float64, device=device)
    return value.to(device, torch.float64)


@dataclass
class Counters:
    """Sums over the whole run, kept in its checkpoints. The window holds the steps that were not logged yet."""

    tokens: int = 0
    trained_tokens: int = 0
    train_s: float = 0.0
    loss_sum: float = 0.0
    steps: int = 0
    window_loss: float = 0.0
    window_steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None

    def add(self, facts: StepFacts, seconds: float) -> None:
        """Count one optimizer step."""
        self.tokens += facts.tokens
        self.trained_tokens += facts.trained_tokens
        self.train_s += seconds
        self.loss_sum += facts.loss
        self.steps += 1
        self.window_loss += facts.loss
        self.window_steps += 1
        self.first_loss = facts.loss if self.first_loss is None else self.first_loss
        self.last_loss = facts.loss

    def take_window(self) -> float:
        """Return the mean loss of the steps since the last call."""
        mean = self.window_loss / max(1, self.window_steps)
        self.window_loss, self.window_steps = 0.0, 0
        return mean

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON."""
        return asdict(self)
