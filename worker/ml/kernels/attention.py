"""Attention over rows that lie end to end without padding, each seeing itself alone.

On a card torch's own kernel for rows of various lengths computes it; elsewhere one product for each row. The kernel is
called below `varlen_attn`, torch's public door to it: that costs the host as much time as all products of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

# FlashAttention 2 takes no larger heads.
_MOST_HEAD = 256


# Query, key and value [tokens, heads, size]; the last two may have fewer heads.
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Spans:
    """Where rows begin: `starts` [rows + 1] on the device, the same as numbers, and the longest row's length."""

    starts: torch.Tensor
    bounds: tuple[int, ...]
    longest: int


@dataclass(frozen=True)
class Attended:
    """The output [tokens, heads, size] of causal attention of each row to itself, and what its gradient needs.

    `rows`: what was attended; None where that is cheaper to have again than to keep.
    """

    rows: Rows | None
    out: torch.Tensor
    spans: Spans
    scale: float
    kept: tuple[Any, ...]

    def grad(self, grad: torch.Tensor, rows: Rows) -> Rows:
        """Return the gradients of query, key and value, which are `rows`."""
        if not self.out.is_cuda:
            with torch.enable_grad():
                one, two, three = leaves = [part.detach().requires_grad_() for part in rows]
                made = row_by_row(one, two, three, self.spans, self.scale)
            one, two, three = torch.autograd.grad(made, leaves, grad)
            return one, two, three
        starts, longest = self.spans.starts, self.spans.longest
        log_sums, *random = self.kept
        found: Rows = torch.ops.aten._flash_attention_backward(
            grad, *rows, self.out, log_sums, starts, starts, longest, longest, 0.0, True, *random, scale=self.scale
        )
        return found


def has_kernel() -> bool:
    """Return whether this torch has the card's kernel."""
    return hasattr(torch.ops.aten, "_flash_attention_forward") and torch.backends.cuda.is_flash_attention_available()


def takes(dtype: torch.dtype, head_size: int) -> bool:
    """Return whether the card's kernel computes in `dtype`, on heads of `head_size` numbers."""
    return dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= _MOST_HEAD


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float) -> Attended:
    """Return the attention of `query`, and of `key` and `value`, which may have fewer heads."""
    rows = query, key, value
    if not query.is_cuda:
        return Attended(rows, row_by_row(query, key, value, spans, scale), spans, scale, ())
    starts, longest = spans.starts, spans.longest
    out, log_sums, *random, _ = torch.ops.aten._flash_attention_forward(
        *rows, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )
    return Attended(rows, out, spans, scale, (log_sums, *random))


def row_by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    """Return what `attend` does, one row after the other."""
    made = []
    for start, end in pairwise(spans.bounds):
        one, two, three = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            one, two, three, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        made.append(out[0].transpose(0, 1))
    return torch.cat(made)
