"""One decoder layer of Llama's kin as a single autograd function, with its backward pass written out.

Eager layers launch some sixty operations and keep a dozen tensors for each token. Here projections of one input are one
product, everything between the products is one pass over memory, and what is kept is what cannot be had cheaply again:
norms are recomputed from their scale, dropout from its seed. How much more is recomputed is chosen for each call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch

from worker.ml.kernels.attention import Attended, Rows, Spans, attend
from worker.ml.kernels.linear import Group
from worker.ml.kernels.operations import Operations

_SEED_STEP = 0x632BE5AB


class Recompute(IntEnum):
    """What a layer computes again in its backward pass: nothing, gate and up of its MLP, or everything."""

    NOTHING = 0
    MLP = 1
    ALL = 2


@dataclass(frozen=True)
class Parts:
    """A layer's own modules, as the function wants them.

    `head_norm` [heads + kv_heads, head_size]: the weights of the norm of each query and key before it turns, where they
    have one. `turns`: whether they turn at all. `branch`: what both branches are multiplied by before they are added.
    """

    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    first_norm: torch.Tensor
    second_norm: torch.Tensor
    eps: float
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    head_norm: torch.Tensor | None = None
    turns: bool = True
    branch: float = 1.0

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every group, in the order in which their factors are handed to the function."""
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        """Every trained matrix."""
        return tuple(factor for group in self.groups for factor in group.factors)


@dataclass(frozen=True)
class Call:
    """One pass through one layer. `cos` and `sin` are [tokens, turned]: so many numbers of each head turn."""

    parts: Parts
    ops: Operations
    spans: Spans
    cos: torch.Tensor
    sin: torch.Tensor
    seed: int
    recompute: Recompute

    def split(self, factors: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
        """Return the factors of each group."""
        found, at = [], 0
        for group in self.parts.groups:
            count = len(group.factors)
            found.append(factors[at : at + count])
            at += count
        return found

    def seed_of(self, index: int) -> int:
        """Return the seed of the dropout in the group at `index`."""
        return (self.seed + index * _SEED_STEP) & 0x7FFFFFFF


@dataclass
class _Kept:
    # What the first half of a layer leaves for its backward pass.
    first_scale: torch.Tensor
    heads: torch.Tensor
    qkv_low: torch.Tensor | None
    attended: Attended
    out_low: torch.Tensor | None
    middle: torch.Tensor
    second_scale: torch.Tensor
    # What the second half does.
    gate_up: torch.Tensor | None = None
    gate_up_low: torch.Tensor | None = None
    down_low: torch.Tensor | None = None


def run_layer(call: Call, x: torch.Tensor) -> torch.Tensor:
    """Return the layer's output for `x` [tokens, hidden]."""
    made: torch.Tensor = _Layer.apply(call, x, *call.parts.factors)
    return made


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        ctx.call, ctx.x, ctx.factors = call, x, factors
        with torch.autocast(x.device.type, enabled=False):
            kept, normed = _first_half(call, x, factors)
            out = _second_half(call, kept, normed, factors)
        if call.recompute == Recompute.MLP:
            kept.gate_up = None
        ctx.kept = None if call.recompute == Recompute.ALL else kept
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, x, factors, kept = ctx.call, ctx.x, ctx.factors, ctx.kept
        # The graph outlives this call, and would hold the tensors until its end.
        ctx.call = ctx.x = ctx.factors = ctx.kept = None
        with torch.autocast(x.device.type, enabled=False):
            normed = None
            if kept is None:
                kept, normed = _first_half(call, x, factors)
            grad = grads[0].contiguous()
            middle, later = _second_half_grad(call, kept, normed, grad, factors)
            first, earlier = _first_half_grad(call, kept, x, middle, factors, wanted=ctx.needs_input_grad[1])
        return None, first, *earlier, *later


def _first_half(call: Call, x: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> tuple[_Kept, torch.Tensor]:
    """Return what is kept up to the second norm, and that norm's output."""
    parts, ops = call.parts, call.ops
    of_qkv, of_out, _, _ = call.split(factors)
    normed, first_scale = ops.rms_norm(x, parts.first_norm, parts.eps)
    joined, qkv_low = parts.qkv.forward(ops, normed, parts.qkv.weight(), of_qkv, call.seed_of(0))
    rows = joined.view(len(x), -1, parts.head_size)
    attended = attend(*_turn(call, rows), call.spans, parts.scale)
    if parts.head_norm is not None:
        # What went in is kept, and what was attended is made of it again.
        attended = replace(attended, rows=None)
    flat = attended.out.view(len(x), -1)
    added, out_low = parts.out.forward(ops, flat, parts.out.weight(), of_out, call.seed_of(1))
    if parts.branch != 1:
        added.mul_(parts.branch)
    middle, normed, second_scale = ops.add_rms_norm(x, added, parts.second_norm, parts.eps)
    return _Kept(first_scale, rows, qkv_low, attended, out_low, middle, second_scale), normed


def _turn(call: Call, rows: torch.Tensor) -> Rows:
    """Return query, key and value of `rows` [tokens, all heads, size], which turn in place where they have no norm."""
    parts, turned = call.parts, call.parts.heads + call.parts.kv_heads
    made = rows
    if parts.head_norm is None:
        call.ops.rotate(rows[:, :turned], call.cos, call.sin)
    else:
        made = call.ops.norm_rotate(rows[:, :turned], parts.head_norm, parts.eps, call.cos, call.sin)
    return made[:, : parts.heads], made[:, parts.heads : turned], rows[:, turned:]


def _turn_back(call: Call, kept: _Kept, grads: Rows) -> torch.Tensor:
    """Return the gradient of the first projection's outputs, from those of what was attended."""
    parts, ops = call.parts, call.ops
    if parts.head_norm is None:
        joined = kept.heads.new_empty(kept.heads.shape)
        ops.rotate_back(grads, joined, call.cos, call.sin)
    else:
        joined = kept.heads
        ops.norm_rotate_back(grads, joined, parts.head_norm, parts.eps, call.cos, call.sin)
    return joined.view(len(joined), -1)


def _second_half(call: Call, kept: _Kept, normed: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the layer's output, and keep what the MLP's backward pass needs."""
    parts, ops = call.parts, call.ops
    _, _, of_gate_up, of_down = call.split(factors)
    kept.gate_up, kept.gate_up_low = parts.gate_up.forward(
        ops, normed, parts.gate_up.weight(), of_gate_up, call.seed_of(2)
    )
    inner = ops.swiglu(kept.gate_up)
    out, kept.down_low = parts.down.forward(ops, inner, parts.down.weight(), of_down, call.seed_of(3))
    return out.add_(kept.middle) if parts.branch == 1 else out.mul_(parts.branch).add_(kept.middle)


def _second_half_grad(
    call: Call, kept: _Kept, normed: torch.Tensor | None, grad: torch.Tensor, factors: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the gradient of the layer's middle, and those of the MLP's factors."""
    parts, ops = call.parts, call.ops
    _, _, of_gate_up, of_down = call.split(factors)
    if normed is None and (kept.gate_up is None or parts.gate_up.adapters):
        normed = ops.apply_norm(kept.middle, parts.second_norm, kept.second_scale)
    weight = None
    if kept.gate_up is None:
        assert normed is not None
        weight = parts.gate_up.weight()
        kept.gate_up, kept.gate_up_low = parts.gate_up.forward(ops, normed, weight, of_gate_up, call.seed_of(2))
    branch = grad if parts.branch == 1 else grad * parts.branch
    low = parts.down.low_grad(branch, of_down)
    inner_grad = parts.down.input_grad(ops, branch, low, parts.down.weight(), of_down, call.seed_of(3))
    if parts.down.adapters and kept.down_low is None:
        made = ops.swiglu(kept.gate_up)
        kept.down_low = ops.down(made, parts.down.cast(of_down, made.dtype)[0], parts.down.rank, call.seed_of(3),
                                 parts.down.dropout)  # fmt: skip
    inner = ops.swiglu_grad(inner_grad, kept.gate_up, wanted=bool(parts.down.adapters))
    down_grads = [] if inner is None else parts.down.factor_grads(
        ops, branch, low, inner, kept.down_low, call.seed_of(3)
    )  # fmt: skip
    del inner_grad, inner, branch
    joined, kept.gate_up = kept.gate_up, None
    low = parts.gate_up.low_grad(joined, of_gate_up)
    gate_up_grads: list[torch.Tensor] = []
    if low is not None:
        assert normed is not None
        gate_up_grads = parts.gate_up.factor_grads(ops, joined, low, normed, kept.gate_up_low, call.seed_of(2))
    del normed
    weight = parts.gate_up.weight() if weight is None else weight
    normed_grad = parts.gate_up.input_grad(ops, joined, low, weight, of_gate_up, call.seed_of(2))
    middle = ops.rms_norm_grad(normed_grad, kept.middle, parts.second_norm, kept.second_scale, grad)
    return middle, [*gate_up_grads, *down_grads]


def _first_half_grad(
    call: Call,
    kept: _Kept,
    x: torch.Tensor,
    grad: torch.Tensor,
    factors: tuple[torch.Tensor, ...],
    *,
    wanted: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Return the gradient of the layer's input if that is `wanted`, and those of the attention's factors."""
    parts, ops = call.parts, call.ops
    of_qkv, of_out, _, _ = call.split(factors)
    flat = kept.attended.out.view(len(x), -1)
    branch = grad if parts.branch == 1 else grad * parts.branch
    low = parts.out.low_grad(branch, of_out)
    out_grads = parts.out.factor_grads(ops, branch, low, flat, kept.out_low, call.seed_of(1))
    flat_grad = parts.out.input_grad(ops, branch, low, parts.out.weight(), of_out, call.seed_of(1))
    rows = kept.attended.rows or _turn(call, kept.heads)
    turned = kept.attended.grad(flat_grad.view_as(kept.attended.out), rows)
    joined = _turn_back(call, kept, turned)
    del rows, turned, flat_grad, flat, branch
    low = parts.qkv.low_grad(joined, of_qkv)
    qkv_grads: list[torch.Tensor] = []
    if low is not None:
        normed = ops.apply_norm(x, parts.first_norm, kept.first_scale)
        qkv_grads = parts.qkv.factor_grads(ops, joined, low, normed, kept.qkv_low, call.seed_of(0))
        del normed
    if not wanted:
        return None, [*qkv_grads, *out_grads]
    normed_grad = parts.qkv.input_grad(ops, joined, low, parts.qkv.weight(), of_qkv, call.seed_of(0))
    return ops.rms_norm_grad(normed_grad, x, parts.first_norm, kept.first_scale, grad), [*qkv_grads, *out_grads]
