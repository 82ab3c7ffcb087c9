"""How far apart two models are on the same rows: their logits, computed in fp32 whatever the weights are held in.

In 16-bit arithmetic every layer rounds its result, which hides what the weights are: on SmolLM2-135M a merged model and
its adapter on the fly then differ by 2% of the logits, ten times what the rounding of the merged weights alone does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import linear

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Difference:
    """What the second of two models says otherwise, over all tokens.

    `relative` is the root mean square of the differences between the logits, over that of the logits themselves, both
    freed of each token's mean, which no probability depends on. `kl` is the mean divergence in nats from the first's
    distribution of the next token, `top1` the share of tokens after which both hold the same one likeliest.
    """

    relative: float
    max_abs: float
    kl: float
    top1: float

    def rounded(self) -> dict[str, float | None]:
        """Return the values as JSON, to three digits; None for what is not finite."""
        return {name: float(f"{value:.3g}") if math.isfinite(value) else None for name, value in asdict(self).items()}


@torch.no_grad()
def answers(model: torch.nn.Module, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the logits of `model` on each row, computed in fp32: `[tokens, vocabulary]` each, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    with fp32_arithmetic(model):
        return [
            model(input_ids=torch.tensor([list(row)], device=device), use_cache=False).logits[0].float().cpu()
            for row in rows
        ]


@contextmanager
def fp32_arithmetic(model: torch.nn.Module) -> Iterator[None]:
    """Let `model` compute in fp32 on the weights that it has, 16-bit or 4-bit, without a second copy of them.

    Each module's own weights are widened while it runs. LoRA matrices must be fp32 already: peft casts their input to
    what they are. Weights of a 4-bit layer are dequantised to 16 bit first, as in training: bitsandbytes 0.50 would
    skip that rounding if it were asked for fp32.
    """
    hooks, layers = [], [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.forward = partial(_dequantized_product, layer)  # type: ignore[method-assign]
    for module in model.modules():
        if own := [weight for weight in module.parameters(recurse=False) if weight.dtype in _HALVES]:
            swap = _Swap(own)
            hooks += [
                module.register_forward_pre_hook(swap.widen),
                module.register_forward_hook(swap.narrow, always_call=True),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            del layer.forward


def _dequantized_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return linear(x, weight.float(), layer.bias)


class _Swap:
    def __init__(self, weights: list[torch.nn.Parameter]):
        self._weights = weights
        self._narrow: list[torch.Tensor] = []

    def widen(self, *_: Any) -> None:
        self._narrow = [weight.data for weight in self._weights]
        for weight in self._weights:
            weight.data = weight.data.float()

    def narrow(self, *_: Any) -> None:
        for weight, data in zip(self._weights, self._narrow, strict=False):
            weight.data = data
        self._narrow = []


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> Difference:
    """Return how the answers of a `second` model differ from those of the `first` on the same rows."""
    square = squares = kl = same = max_abs = 0.0
    tokens = 0
    for one, other in _stretches(first, second):
        gap = one - other
        max_abs = max(max_abs, float(gap.abs().max())) if bool(gap.isfinite().all()) else math.inf
        square += float(_centred(gap).square().sum())
        squares += float(_centred(one).square().sum())
        kl += float((one.softmax(-1) * (one.log_softmax(-1) - other.log_softmax(-1))).sum())
        same += float((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(one)
    relative = (square / squares) ** 0.5 if squares else float(square > 0)
    return Difference(relative, max_abs, kl / tokens, same / tokens)


def _stretches(
    first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # A few tokens at a time: in fp64, a row of a large vocabulary takes a gigabyte.
    for one, other in zip(first, second, strict=True):
        yield from ((left.double(), right.double()) for left, right in zip(one.split(16), other.split(16), strict=True))


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)
