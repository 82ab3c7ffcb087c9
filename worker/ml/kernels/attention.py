"""Attention over rows that lie end to end without padding, each seeing itself alone.

On a card torch's own variable-length kernel computes it; elsewhere one product for each row. `register` makes the same
known to transformers, for the architectures whose layers are not fused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tunery_varlen"


@dataclass(frozen=True)
class Spans:
    """Where rows begin: `starts` [rows + 1] on the device, the same as numbers, and the longest row's length."""

    starts: torch.Tensor
    bounds: tuple[int, ...]
    longest: int


def has_varlen() -> bool:
    """Return whether this torch has the kernel."""
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return True


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    """Return causal attention [tokens, heads, size] of each row to itself; `key` and `value` may have fewer heads."""
    if query.device.type == "cuda":
        return _on_card(query, key, value, spans, scale)
    return row_by_row(query, key, value, spans, scale)


def _on_card(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    # torch 2.11 has neither name for what later versions want to be told.
    options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in known else {}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    starts, longest = spans.starts, spans.longest
    out: torch.Tensor = varlen_attn(query, key, value, starts, starts, longest, longest, scale=scale, **options)
    return out


def row_by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    """Return what `attend` does, one row after the other."""
    made = []
    for start, end in pairwise(spans.bounds):
        row = [part[start:end].transpose(0, 1)[None] for part in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *row, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        made.append(out[0].transpose(0, 1))
    return torch.cat(made)


def register() -> None:
    """Tell transformers of this attention, under `NAME`."""
    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    spans: Spans | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # query [1, heads, tokens, size]. Padded rows, as in an evaluation or in generation, come with a mask instead.
    if spans is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = (part[0].transpose(0, 1) for part in (query, key, value))
        return attend(*rows, spans, scale)[None], None
    if module.training and torch.is_grad_enabled():
        raise RuntimeError(f"{NAME}: no row bounds came with the batch, so rows would see each other")
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
