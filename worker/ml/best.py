"""The best evaluation so far: when to stop waiting for a better one, and the weights that it had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@dataclass
class Best:
    """The lowest validation loss of a run. `waited`: evaluations since the last one that was better by a margin."""

    step: int | None = None
    loss: float | None = None
    waited: int = 0

    def see(self, step: int, loss: float, threshold: float) -> bool:
        """Take the loss of an evaluation, and return whether it is the lowest yet.

        As transformers' EarlyStoppingCallback counts: one that is lower, but by no more than `threshold`, is the best
        and yet no reason to go on.
        """
        improved = self.loss is None or loss < self.loss
        enough = self.loss is None or loss < self.loss - threshold
        self.waited = 0 if enough else self.waited + 1
        if improved:
            self.step, self.loss = step, loss
        return improved


def store_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the trained weights of `model`; a crash leaves the file that was there, or the new one."""
    weights = {name: item.detach().cpu().contiguous() for name, item in _trained(model).items()}
    partial = path.with_suffix(".partial")
    save_file(weights, partial)
    partial.rename(path)


def take_weights(model: torch.nn.Module, path: Path) -> None:
    """Give `model` the trained weights in `path`."""
    stored = load_file(path)
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(stored[name])


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
