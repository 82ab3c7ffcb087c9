"""Asks a model whether it keeps packed rows apart. Some architectures attend across them, without a word."""

from __future__ import annotations

import torch

from common.errors import InvalidInput

_PROBE_TOKENS = 24
_SHARE = 0.25


def require_isolation(model: torch.nn.Module, first: list[int], second: list[int]) -> None:
    """Raise InvalidInput if `model` lets the second of two packed rows see the first.

    The logits of `second` after `first`, with positions that begin anew, are compared with its logits alone; what the
    difference would be if it saw the first row is measured too, so that no dtype needs a tolerance of its own.
    """
    rows = [row[:_PROBE_TOKENS] for row in (first, second)]
    device = next(model.parameters()).device
    alone = _logits(model, rows[1], list(range(len(rows[1]))), device)
    fresh = [position for row in rows for position in range(len(row))]
    packed = _logits(model, rows[0] + rows[1], fresh, device)[-len(rows[1]) :]
    joined = _logits(model, rows[0] + rows[1], list(range(len(fresh))), device)[-len(rows[1]) :]
    if (packed - alone).abs().mean() > _SHARE * (joined - alone).abs().mean():
        raise InvalidInput(
            "hyperparameters.packing: this base model lets packed rows see each other",
            code="packing_not_supported",
            param="hyperparameters.packing",
            hint="set packing to false; group_by_length saves padding too",
        )


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: list[int], positions: list[int], device: torch.device) -> torch.Tensor:
    training = model.training
    model.eval()
    try:
        output = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
        )
    finally:
        model.train(training)
    return output.logits[0].float()  # [tokens, vocabulary]
