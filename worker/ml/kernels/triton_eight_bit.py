# mypy: ignore-errors
"""The operations of `torch_eight_bit` on a card: the products are the card's own, the rest one pass over memory each.

Written in Triton's language, see `triton_ops`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.ml.kernels import torch_ops
from worker.ml.kernels.packed import BLOCK, OUTER
from worker.ml.kernels.torch_eight_bit import EIGHT_BIT, LARGEST, LEAST


@triton.jit
def _narrow(x, out, scales, size, stride, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * stride + at, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), LEAST) / LARGEST
    tl.store(scales + row, scale)
    tl.store(out + row * size + at, (value / scale).to(tl.float8e4nv), inside)


def narrow(x):
    rows, size = x.shape
    out, scales = x.new_empty(rows, size, dtype=EIGHT_BIT), x.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    warps = 8 if block <= 8192 else 16
    _narrow[(rows,)](x, out, scales, size, x.stride(0), LARGEST, LEAST, block, num_warps=warps)
    return out, scales


def narrow_product(x, matrix, scale, bias, *, exact):
    rows, scales = narrow(x)
    return torch._scaled_mm(
        rows, matrix.T, scales, scale, bias=bias, out_dtype=x.dtype, use_fast_accum=not exact
    )  # fmt: skip


@triton.jit
def scale_of(block, scales, table, factors, offsets, inside, NESTED: tl.constexpr, OUTER: tl.constexpr):
    scale = tl.load(scales + block, inside, 0)
    if NESTED:
        inner = tl.load(table + scale.to(tl.int32), inside, 0.0)
        scale = inner * tl.load(factors + block // OUTER, inside, 0.0) + tl.load(offsets + block // OUTER, inside, 0.0)
    return scale


@triton.jit
def _unpacked(both, code, scale, factor):
    # By way of bfloat16, as the weights in 16 bit have it.
    times = tl.load(factor)
    first = (tl.load(code + (both >> 4)) * scale).to(tl.bfloat16).to(tl.float32) * times
    second = (tl.load(code + (both & 15)) * scale).to(tl.bfloat16).to(tl.float32) * times
    return first, second


@triton.jit
def _narrow_weights(
    packed, scales, code, table, factors, offsets, factor, out, blocks,
    NESTED: tl.constexpr, OUTER: tl.constexpr, HALF: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    inside = block < blocks
    scale = scale_of(block, scales, table, factors, offsets, inside, NESTED, OUTER)[:, None]
    both = tl.load(packed + block[:, None] * HALF + tl.arange(0, HALF)[None, :], inside[:, None], 0).to(tl.int32)
    first, second = _unpacked(both, code, scale, factor)
    place = block[:, None] * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + place, tl.interleave(first, second).to(tl.float8e4nv), inside[:, None])


@triton.jit
def _narrow_turned(
    packed, scales, code, table, factors, offsets, factor, out, outputs, blocks_in_row,
    NESTED: tl.constexpr, OUTER: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A program has one block of the inputs, for some rows of outputs.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < outputs
    block = row * blocks_in_row + tl.program_id(1)
    scale = scale_of(block, scales, table, factors, offsets, inside, NESTED, OUTER)[:, None]
    half = tl.arange(0, HALF)
    both = tl.load(packed + block[:, None] * HALF + half[None, :], inside[:, None], 0).to(tl.int32)
    first, second = _unpacked(both, code, scale, factor)
    place = out + (tl.program_id(1).to(tl.int64) * 2 * HALF + 2 * half[:, None]) * outputs + row[None, :]
    tl.store(place, tl.trans(first.to(tl.float8e4nv)), inside[None, :])
    tl.store(place + outputs, tl.trans(second.to(tl.float8e4nv)), inside[None, :])


def narrow_weights(packed, factor, *, turned):
    outputs, inputs = packed.shape
    if inputs % BLOCK:
        return torch_ops.narrow_weights(packed, factor, turned=turned)
    out = torch.empty((inputs, outputs) if turned else packed.shape, dtype=EIGHT_BIT, device=packed.values.device)
    outer = packed.outer or (packed.code, packed.code, packed.code)
    held = packed.values, packed.scales, packed.code, *outer, factor, out
    nested, blocks_in_row, count = packed.outer is not None, inputs // BLOCK, len(packed.scales)
    if turned:
        _narrow_turned[(triton.cdiv(outputs, 128), blocks_in_row)](
            *held, outputs, blocks_in_row, nested, OUTER, BLOCK // 2, 128, num_warps=4
        )
    else:
        _narrow_weights[(triton.cdiv(count, 64),)](*held, count, nested, OUTER, BLOCK // 2, 64, num_warps=4)
    return out
