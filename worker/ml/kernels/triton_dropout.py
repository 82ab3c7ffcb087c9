# mypy: ignore-errors
"""The products of an adapter under dropout: masks are drawn while they multiply, and never stored.

Written in Triton's language, see `triton_ops`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.ml.kernels import torch_ops
from worker.ml.kernels.torch_ops import threshold

_SPREAD = tl.constexpr(0x9E3779B1)
_FIRST = tl.constexpr(0x85EBCA6B)
_SECOND = tl.constexpr(0xC2B2AE35)
_NEXT = tl.constexpr(0x3C6EF372)
# The rank up to which an adapter's factor fits beside the other tiles; also the least that a tensor core multiplies.
_MOST_RANK, _LEAST_RANK = 64, 16


@triton.jit
def _kept(offset, key, limit):
    word = (offset.to(tl.uint32) * _SPREAD) ^ key
    word = (word ^ (word >> 16)) * _FIRST + key
    word = (word ^ (word >> 13)) * _SECOND
    return (word ^ (word >> 16)) >= limit


@triton.jit
def _key(seed, index):
    return seed.to(tl.uint32) + (tl.full((), index, tl.uint32) * _NEXT)


@triton.jit(do_not_specialize=["rows", "seed", "limit"])
def _down(
    x, a, out, rows, columns, seed, limit, factor,
    RANK: tl.constexpr, WIDE: tl.constexpr, ADAPTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, WIDE)
    most = limit.to(tl.uint32)
    total0 = tl.zeros((ROWS, WIDE), tl.float32)
    total1 = tl.zeros((ROWS, WIDE), tl.float32)
    total2 = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        offset = row[:, None] * columns + at[None, :]
        value = tl.load(x + offset, inside, 0.0)
        place = a + part[None, :] * columns + at[:, None]
        held = (part < RANK)[None, :] & (at < columns)[:, None]
        kept = tl.where(_kept(offset, _key(seed, 0), most), value, 0.0)
        total0 = tl.dot(kept, tl.load(place, held, 0.0), total0, input_precision="ieee")
        if ADAPTERS > 1:
            kept = tl.where(_kept(offset, _key(seed, 1), most), value, 0.0)
            total1 = tl.dot(kept, tl.load(place + RANK * columns, held, 0.0), total1, input_precision="ieee")
        if ADAPTERS > 2:
            kept = tl.where(_kept(offset, _key(seed, 2), most), value, 0.0)
            total2 = tl.dot(kept, tl.load(place + 2 * RANK * columns, held, 0.0), total2, input_precision="ieee")
    place = out + row[:, None] * (ADAPTERS * RANK) + part[None, :]
    held = (row < rows)[:, None] & (part < RANK)[None, :]
    tl.store(place, (total0 * factor).to(out.dtype.element_ty), held)
    if ADAPTERS > 1:
        tl.store(place + RANK, (total1 * factor).to(out.dtype.element_ty), held)
    if ADAPTERS > 2:
        tl.store(place + 2 * RANK, (total2 * factor).to(out.dtype.element_ty), held)


def down(x, a, rank, seed, p):
    if p == 0 or rank > _MOST_RANK or len(a) > 3 * rank:
        return torch_ops.down(x, a, rank, seed, p)
    rows, columns = x.shape
    out = x.new_empty(rows, len(a))
    _down[(triton.cdiv(rows, 32),)](
        x, a, out, rows, columns, seed, threshold(p), 1 / (1 - p),
        rank, max(_LEAST_RANK, triton.next_power_of_2(rank)), len(a) // rank, 32, 128, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "seed", "limit", "share"])
def _down_grad(
    grad, x, out, rows, columns, seed, limit, factor, share,
    RANK: tl.constexpr, WIDE: tl.constexpr, ADAPTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, WIDE)
    most = limit.to(tl.uint32)
    total0 = tl.zeros((WIDE, COLUMNS), tl.float32)
    total1 = tl.zeros((WIDE, COLUMNS), tl.float32)
    total2 = tl.zeros((WIDE, COLUMNS), tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        offset = row[:, None] * columns + at[None, :]
        value = tl.load(x + offset, inside, 0.0)
        place = grad + row[None, :] * (ADAPTERS * RANK) + part[:, None]
        held = (row < rows)[None, :] & (part < RANK)[:, None]
        kept = tl.where(_kept(offset, _key(seed, 0), most), value, 0.0)
        total0 = tl.dot(tl.load(place, held, 0.0), kept, total0, input_precision="ieee")
        if ADAPTERS > 1:
            kept = tl.where(_kept(offset, _key(seed, 1), most), value, 0.0)
            total1 = tl.dot(tl.load(place + RANK, held, 0.0), kept, total1, input_precision="ieee")
        if ADAPTERS > 2:
            kept = tl.where(_kept(offset, _key(seed, 2), most), value, 0.0)
            total2 = tl.dot(tl.load(place + 2 * RANK, held, 0.0), kept, total2, input_precision="ieee")
    place = out + (tl.program_id(1) * ADAPTERS * RANK + part)[:, None] * columns + at[None, :]
    held = (part < RANK)[:, None] & (at < columns)[None, :]
    tl.store(place, total0 * factor, held)
    if ADAPTERS > 1:
        tl.store(place + RANK * columns, total1 * factor, held)
    if ADAPTERS > 2:
        tl.store(place + 2 * RANK * columns, total2 * factor, held)


def down_grad(grad, x, rank, seed, p):
    if p == 0 or rank > _MOST_RANK or grad.shape[1] > 3 * rank:
        return torch_ops.down_grad(grad, x, rank, seed, p)
    (rows, columns), count = x.shape, grad.shape[1] // rank
    # The rows are summed in shares, so that enough programs run; the shares in a fixed order, so that sums repeat.
    share = triton.cdiv(triton.cdiv(rows, 8), 64) * 64
    shares = triton.cdiv(rows, share)
    out = x.new_empty(shares, grad.shape[1], columns, dtype=torch.float32)
    _down_grad[(triton.cdiv(columns, 64), shares)](
        grad, x, out, rows, columns, seed, threshold(p), 1 / (1 - p), share,
        rank, max(_LEAST_RANK, triton.next_power_of_2(rank)), count, 64, 64, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out.sum(0).to(x.dtype)


@triton.jit(do_not_specialize=["rows", "seed", "limit"])
def _add_up(
    target, grad, a, rows, columns, seed, limit, factor,
    RANK: tl.constexpr, WIDE: tl.constexpr, ADAPTERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, WIDE)
    most = limit.to(tl.uint32)
    inside = (row < rows)[:, None] & (at < columns)[None, :]
    offset = row[:, None] * columns + at[None, :]
    place = target + offset
    total = tl.load(place, inside, 0.0).to(tl.float32)
    for index in tl.static_range(ADAPTERS):
        outer = tl.load(grad + row[:, None] * (ADAPTERS * RANK) + index * RANK + part[None, :],
                        (row < rows)[:, None] & (part < RANK)[None, :], 0.0)  # fmt: skip
        weight = tl.load(a + (index * RANK + part)[:, None] * columns + at[None, :],
                         (part < RANK)[:, None] & (at < columns)[None, :], 0.0)  # fmt: skip
        more = tl.dot(outer, weight, input_precision="ieee")
        total += tl.where(_kept(offset, _key(seed, index), most), more * factor, 0.0)
    tl.store(place, total.to(target.dtype.element_ty), inside)


def add_up(target, grad, a, rank, seed, p):
    if p == 0 or rank > _MOST_RANK:
        torch_ops.add_up(target, grad, a, rank, seed, p)
        return
    rows, columns = target.shape
    _add_up[(triton.cdiv(rows, 64), triton.cdiv(columns, 64))](
        target, grad, a, rows, columns, seed, threshold(p), 1 / (1 - p),
        rank, max(_LEAST_RANK, triton.next_power_of_2(rank)), len(a) // rank, 64, 64, num_warps=4,
    )  # fmt: skip
