# mypy: ignore-errors
"""Rotation of queries and keys, and the norm of each head before it where a family has one, in one pass over memory.

Written in Triton's language, see `triton_ops`. What is known of the sizes when a kernel is compiled leaves no trace in
it: heads that turn as a whole, of a power of two, pay for no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from worker.ml.kernels import torch_ops

# Heads that one program turns.
_HEADS = 8


@triton.jit
def _angles(cos, sin, row, at, TURNED: tl.constexpr, BLOCK: tl.constexpr):
    half: tl.constexpr = TURNED // 2
    place = row * TURNED + at
    if half < BLOCK:
        held = at < half
        cos1, cos2 = tl.load(cos + place, held, 0.0), tl.load(cos + place + half, held, 0.0)
        sin1, sin2 = tl.load(sin + place, held, 0.0), tl.load(sin + place + half, held, 0.0)
    else:
        cos1, cos2 = tl.load(cos + place), tl.load(cos + place + half)
        sin1, sin2 = tl.load(sin + place), tl.load(sin + place + half)
    return cos1.to(tl.float32), cos2.to(tl.float32), sin1.to(tl.float32), sin2.to(tl.float32)


@triton.jit
def _both(source, inside, half):
    return tl.load(source, inside, 0.0).to(tl.float32), tl.load(source + half, inside, 0.0).to(tl.float32)


@triton.jit
def _store_both(target, first, second, inside, half):
    tl.store(target, first.to(target.dtype.element_ty), inside)
    tl.store(target + half, second.to(target.dtype.element_ty), inside)


@triton.jit
def _turned(first, second, angles, BACK: tl.constexpr):
    cos1, cos2, sin1, sin2 = angles
    if BACK:
        left, right = first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        left, right = first * cos1 - second * sin1, second * cos2 + first * sin2
    return left, right


@triton.jit
def _rotate(
    rows, cos, sin, heads, stride, SIZE: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = head < heads
    if TURNED // 2 < BLOCK:
        inside = inside & (at < TURNED // 2)
    place = rows + row * stride + head * SIZE + at
    angles = _angles(cos, sin, row, at, TURNED, BLOCK)
    first, second = _both(place, inside, TURNED // 2)
    left, right = _turned(first, second, angles, False)
    _store_both(place, left, right, inside, TURNED // 2)


def rotate(rows, cos, sin):
    count, heads, size = rows.shape
    turned = cos.shape[1]
    if not turned:
        return
    block = triton.next_power_of_2(turned // 2)
    grid = count, triton.cdiv(heads, _HEADS)
    _rotate[grid](rows, cos, sin, heads, rows.stride(0), size, turned, block, _HEADS, num_warps=2)


@triton.jit
def _copy(source, target, inside):
    tl.store(target, tl.load(source, inside, 0.0), inside)


@triton.jit
def _rotate_back(
    query, key, value, target, cos, sin, heads, kv_heads,
    SIZE: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    whole = heads + 2 * kv_heads
    of_query, of_key = head < heads, (head >= heads) & (head < heads + kv_heads)
    of_value = (head >= heads + kv_heads) & (head < whole)
    query += (row * heads + head) * SIZE
    key += (row * kv_heads + head - heads) * SIZE
    value += (row * kv_heads + head - heads - kv_heads) * SIZE
    target += (row * whole + head) * SIZE
    if TURNED > 0:
        at = tl.arange(0, BLOCK)[None, :]
        angles = _angles(cos, sin, row, at, TURNED, BLOCK)
        held_query, held_key = of_query, of_key
        if TURNED // 2 < BLOCK:
            held_query, held_key = of_query & (at < TURNED // 2), of_key & (at < TURNED // 2)
        first, second = _both(query + at, held_query, TURNED // 2)
        left, right = _turned(first, second, angles, True)
        _store_both(target + at, left, right, held_query, TURNED // 2)
        first, second = _both(key + at, held_key, TURNED // 2)
        left, right = _turned(first, second, angles, True)
        _store_both(target + at, left, right, held_key, TURNED // 2)
    if SIZE == 2 * BLOCK:
        at = tl.arange(0, BLOCK)[None, :]
        _copy(value + at, target + at, of_value)
        _copy(value + at + BLOCK, target + at + BLOCK, of_value)
    else:
        at = tl.arange(0, WIDE)[None, :]
        inside = at < SIZE
        _copy(value + at, target + at, of_value & inside)
    if TURNED < SIZE:
        at = tl.arange(0, WIDE)[None, :]
        rest = (at >= TURNED) & (at < SIZE)
        _copy(query + at, target + at, of_query & rest)
        _copy(key + at, target + at, of_key & rest)


def rotate_back(sources, target, cos, sin):
    query, key, value = sources
    rows, heads, size = query.shape
    if not all(part.is_contiguous() for part in (*sources, target)):
        torch_ops.rotate_back(sources, target, cos, sin)
        return
    turned = cos.shape[1]
    block, wide = triton.next_power_of_2(max(1, turned // 2)), triton.next_power_of_2(size)
    grid = rows, triton.cdiv(heads + 2 * key.shape[1], _HEADS)
    _rotate_back[grid](
        query, key, value, target, cos, sin, heads, key.shape[1], size, turned, block, wide, _HEADS, num_warps=2
    )


@triton.jit
def _norm_rotate(rows, weight, made, cos, sin, heads, stride, eps, SIZE: tl.constexpr, HEADS: tl.constexpr):
    half: tl.constexpr = SIZE // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, half)[None, :]
    inside = head < heads
    angles = _angles(cos, sin, row, at, SIZE, half)
    first, second = _both(rows + row * stride + head * SIZE + at, inside, half)
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / SIZE + eps)[:, None]
    left, right = _both(weight + head * SIZE + at, inside, half)
    dtype: tl.constexpr = rows.dtype.element_ty
    # Rounded where the module rounds.
    first = ((first * scale).to(dtype).to(tl.float32) * left).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * right).to(dtype).to(tl.float32)
    left, right = _turned(first, second, angles, False)
    _store_both(made + (row * heads + head) * SIZE + at, left, right, inside, half)


def norm_rotate(rows, weight, eps, cos, sin):
    count, heads, size = rows.shape
    if size & (size - 1) or cos.shape[1] != size:
        return torch_ops.norm_rotate(rows, weight, eps, cos, sin)
    made = rows.new_empty(rows.shape)
    grid = count, triton.cdiv(heads, _HEADS)
    _norm_rotate[grid](rows, weight, made, cos, sin, heads, rows.stride(0), eps, size, _HEADS, num_warps=2)
    return made


@triton.jit
def _norm_rotate_back(
    query, key, value, rows, weight, cos, sin, heads, kv_heads, eps, SIZE: tl.constexpr, HEADS: tl.constexpr
):
    half: tl.constexpr = SIZE // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, half)[None, :]
    whole = heads + 2 * kv_heads
    of_query, of_key = head < heads, (head >= heads) & (head < heads + kv_heads)
    inside = head < heads + kv_heads
    angles = _angles(cos, sin, row, at, SIZE, half)
    first, second = _both(query + (row * heads + head) * SIZE + at, of_query, half)
    other, another = _both(key + (row * kv_heads + head - heads) * SIZE + at, of_key, half)
    left, right = _turned(first + other, second + another, angles, True)
    place = rows + (row * whole + head) * SIZE + at
    first, second = _both(place, inside, half)
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / SIZE + eps)[:, None]
    first, second = first * scale, second * scale
    factor, another = _both(weight + head * SIZE + at, inside, half)
    left, right = left * factor, right * another
    mean = ((tl.sum(left * first, 1) + tl.sum(right * second, 1)) / SIZE)[:, None]
    _store_both(place, (left - first * mean) * scale, (right - second * mean) * scale, inside, half)
    inside = (head >= heads + kv_heads) & (head < whole)
    source = value + (row * kv_heads + head - heads - kv_heads) * SIZE + at
    _copy(source, place, inside)
    _copy(source + half, place + half, inside)


def norm_rotate_back(sources, rows, weight, eps, cos, sin):
    query, key, value = sources
    count, heads, size = query.shape
    known = not size & (size - 1) and cos.shape[1] == size
    if not known or not all(part.is_contiguous() for part in (*sources, rows)):
        torch_ops.norm_rotate_back(sources, rows, weight, eps, cos, sin)
        return
    grid = count, triton.cdiv(rows.shape[1], _HEADS)
    _norm_rotate_back[grid](
        query, key, value, rows, weight, cos, sin, heads, key.shape[1], eps, size, _HEADS, num_warps=2
    )
