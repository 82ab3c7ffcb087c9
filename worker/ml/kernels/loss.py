"""Mean cross-entropy of a frozen head over the trained tokens alone, without the logits of a whole batch.

The gradient of the hidden states is found in the forward pass, chunk by chunk, so that the backward pass needs neither
the logits nor their product again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from common.memory.fused import HEAD_TOKENS
from worker.ml.kernels.operations import operations


@dataclass(frozen=True)
class Loss:
    """Sums over tokens: the loss, which has a gradient, the entropy, and how often the target was the likeliest."""

    loss: torch.Tensor
    entropy: torch.Tensor
    right: torch.Tensor


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Return the loss of `hidden` [tokens, size], one row for each of `targets`, under the head's `weight`."""
    return Loss(*_HeadLoss.apply(hidden, weight, targets))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[Any, ...]:
        ops = operations(hidden.device)
        grads = torch.empty_like(hidden)
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for at in range(0, len(hidden), HEAD_TOKENS):
                part = slice(at, at + HEAD_TOKENS)
                logits = torch.mm(hidden[part], weight.T)
                sums += torch.stack([row.sum() for row in ops.cross_entropy_grad(logits, targets[part])])
                torch.mm(logits, weight, out=grads[part])
        ctx.grads = grads
        loss, entropy, right = sums.unbind()
        ctx.mark_non_differentiable(entropy, right)
        return loss, entropy, right

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return grads.mul_(outer[0]), None, None
