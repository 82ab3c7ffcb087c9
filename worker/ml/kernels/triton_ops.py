# mypy: ignore-errors
"""The operations of `torch_ops`, each one pass over memory on the card.

The bodies of the kernels are in Triton's language, which has no annotations.
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
def _norm(x, other, weight, total, y, scale, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, inside, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(other + row * size + at, inside, 0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + row * size + at, value, inside)
    wide = value.to(tl.float32)
    found = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    tl.store(scale + row, found)
    factor = tl.load(weight + at, inside, 0.0)
    normed = (wide * found).to(value.dtype)
    tl.store(y + row * size + at, (normed.to(tl.float32) * factor.to(tl.float32)).to(value.dtype), inside)


def rms_norm(x, weight, eps):
    y, scale = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    _norm[(len(x),)](x, x, weight, y, y, scale, x.shape[1], eps, False, triton.next_power_of_2(x.shape[1]), num_warps=8)
    return y, scale


def add_rms_norm(x, other, weight, eps):
    total, y, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    block = triton.next_power_of_2(x.shape[1])
    _norm[(len(x),)](x, other, weight, total, y, scale, x.shape[1], eps, True, block, num_warps=8)
    return total, y, scale


@triton.jit
def _apply(x, weight, scale, y, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, inside, 0.0)
    normed = (value.to(tl.float32) * tl.load(scale + row)).to(value.dtype).to(tl.float32)
    factor = tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(y + row * size + at, (normed * factor).to(value.dtype), inside)


def apply_norm(x, weight, scale):
    y = torch.empty_like(x)
    _apply[(len(x),)](x, weight, scale, y, x.shape[1], triton.next_power_of_2(x.shape[1]), num_warps=8)
    return y


@triton.jit
def _norm_grad(grad, x, weight, scale, residual, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, inside, 0.0)
    factor = tl.load(scale + row)
    normed = value.to(tl.float32) * factor
    inner = tl.load(grad + row * size + at, inside, 0.0).to(tl.float32)
    inner = inner * tl.load(weight + at, inside, 0.0).to(tl.float32)
    inner = inner - normed * (tl.sum(inner * normed, 0) / size)
    more = tl.load(residual + row * size + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * size + at, (inner * factor + more).to(value.dtype), inside)


def rms_norm_grad(grad, x, weight, scale, residual):
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    _norm_grad[(len(x),)](grad, x, weight, scale, residual, out, x.shape[1], block, num_warps=8)
    return out


@triton.jit
def _rotate(
    source, target, cos, sin, heads, from_row, from_head, to_row, to_head,
    SIZE: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, SIZE // 2)[None, :]
    inside = (head < heads) & (at < SIZE // 2)
    angle = row * SIZE + at
    cos1, cos2 = tl.load(cos + angle).to(tl.float32), tl.load(cos + angle + SIZE // 2).to(tl.float32)
    sin1, sin2 = tl.load(sin + angle).to(tl.float32), tl.load(sin + angle + SIZE // 2).to(tl.float32)
    place = source + row * from_row + head * from_head + at
    one = tl.load(place, inside, 0.0)
    first, second = one.to(tl.float32), tl.load(place + SIZE // 2, inside, 0.0).to(tl.float32)
    if BACK:
        left, right = first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        left, right = first * cos1 - second * sin1, second * cos2 + first * sin2
    place = target + row * to_row + head * to_head + at
    tl.store(place, left.to(one.dtype), inside)
    tl.store(place + SIZE // 2, right.to(one.dtype), inside)


def rotate(source, target, cos, sin, *, back=False):
    rows, heads, size = source.shape
    if size & (size - 1):
        torch_ops.rotate(source, target, cos, sin, back=back)
        return
    block = triton.next_power_of_2(heads)
    _rotate[(rows,)](source, target, cos, sin, heads, source.stride(0), source.stride(1), target.stride(0),
                     target.stride(1), size, back, block, num_warps=4)  # fmt: skip


@triton.jit
def _swiglu(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, inside, 0.0)
    up = tl.load(gate_up + row * 2 * size + size + at, inside, 0.0)
    wide = gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out + row * size + at, (silu * up.to(tl.float32)).to(gate.dtype), inside)


def swiglu(gate_up):
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    block = min(4096, triton.next_power_of_2(size))
    _swiglu[(rows, triton.cdiv(size, block))](gate_up, out, size, block, num_warps=8)
    return out


@triton.jit
def _swiglu_grad(grad, gate_up, made, size, WANTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    place = gate_up + row * 2 * size + at
    gate, up = tl.load(place, inside, 0.0), tl.load(place + size, inside, 0.0)
    outer = tl.load(grad + row * size + at, inside, 0.0).to(tl.float32)
    wide, across = gate.to(tl.float32), up.to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = wide * sigmoid
    if WANTED:
        tl.store(made + row * size + at, (silu.to(gate.dtype).to(tl.float32) * across).to(gate.dtype), inside)
    inner = outer * across * sigmoid * (1 + wide * (1 - sigmoid))
    tl.store(place, inner.to(gate.dtype), inside)
    tl.store(place + size, (outer * silu).to(gate.dtype), inside)


def swiglu_grad(grad, gate_up, *, wanted):
    rows, size = grad.shape
    made = torch.empty_like(grad) if wanted else grad
    block = min(4096, triton.next_power_of_2(size))
    _swiglu_grad[(rows, triton.cdiv(size, block))](grad, gate_up, made, size, wanted, block, num_warps=8)
    return made if wanted else None


@triton.jit
def _cross_entropy(logits, targets, losses, entropies, right, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    target = tl.load(targets + row)
    most = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + at, at < size, -float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(value, 0))
        shrink = tl.exp(most - higher)
        part = tl.exp(value - higher)
        total = total * shrink + tl.sum(part, 0)
        weighted = weighted * shrink + tl.sum(tl.where(at < size, part * value, 0.0), 0)
        most = higher
    log_sum = most + tl.log(total)
    wanted = tl.load(logits + target).to(tl.float32)
    tl.store(losses + row, log_sum - wanted)
    tl.store(entropies + row, log_sum - weighted / total)
    tl.store(right + row, (wanted >= most).to(tl.float32))
    # Every thread has to have read the target before it is overwritten.
    tl.debug_barrier()
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + at, at < size, -float("inf"))
        chance = tl.exp(value.to(tl.float32) - log_sum) - tl.where(at == target, 1.0, 0.0)
        tl.store(logits + at, chance.to(value.dtype), at < size)


def cross_entropy_grad(logits, targets):
    losses, entropies, right = logits.new_empty(3, len(logits), dtype=torch.float32).unbind()
    block = min(8192, triton.next_power_of_2(logits.shape[1]))
    _cross_entropy[(len(logits),)](logits, targets, losses, entropies, right, logits.shape[1], block, num_warps=16)
    return losses, entropies, right


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
    RANK: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, ADAPTERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, WIDE)
    key = _key(seed, INDEX)
    most = limit.to(tl.uint32)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        offset = row[:, None] * columns + at[None, :]
        value = tl.load(x + offset, inside & _kept(offset, key, most), 0.0)
        weight = tl.load(a + (INDEX * RANK + part)[None, :] * columns + at[:, None],
                         (part < RANK)[None, :] & (at < columns)[:, None], 0.0)  # fmt: skip
        total = tl.dot(value, weight, total, input_precision="ieee")
    place = out + row[:, None] * (ADAPTERS * RANK) + INDEX * RANK + part[None, :]
    tl.store(place, (total * factor).to(out.dtype.element_ty), (row < rows)[:, None] & (part < RANK)[None, :])


def down(x, a, rank, seed, p):
    if p == 0 or rank > _MOST_RANK:
        return torch_ops.down(x, a, rank, seed, p)
    rows, columns = x.shape
    out = x.new_empty(rows, len(a))
    for index in range(len(a) // rank):
        _down[(triton.cdiv(rows, 32),)](
            x, a, out, rows, columns, seed, threshold(p), 1 / (1 - p),
            rank, max(_LEAST_RANK, triton.next_power_of_2(rank)), index, len(a) // rank, 32, 128, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "seed", "limit", "share"])
def _down_grad(
    grad, x, out, rows, columns, seed, limit, factor, share,
    RANK: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, ADAPTERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, WIDE)
    key = _key(seed, INDEX)
    most = limit.to(tl.uint32)
    total = tl.zeros((WIDE, COLUMNS), tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (at < columns)[None, :]
        offset = row[:, None] * columns + at[None, :]
        value = tl.load(x + offset, inside & _kept(offset, key, most), 0.0)
        outer = tl.load(grad + row[None, :] * (ADAPTERS * RANK) + INDEX * RANK + part[:, None],
                        (row < rows)[None, :] & (part < RANK)[:, None], 0.0)  # fmt: skip
        total = tl.dot(outer, value, total, input_precision="ieee")
    place = out + (tl.program_id(1) * ADAPTERS * RANK + INDEX * RANK + part)[:, None] * columns + at[None, :]
    tl.store(place, total * factor, (part < RANK)[:, None] & (at < columns)[None, :])


def down_grad(grad, x, rank, seed, p):
    if p == 0 or rank > _MOST_RANK:
        return torch_ops.down_grad(grad, x, rank, seed, p)
    (rows, columns), count = x.shape, grad.shape[1] // rank
    # The rows are summed in shares, so that enough programs run; the shares in a fixed order, so that sums repeat.
    share = triton.cdiv(triton.cdiv(rows, 8), 64) * 64
    shares = triton.cdiv(rows, share)
    out = x.new_empty(shares, grad.shape[1], columns, dtype=torch.float32)
    for index in range(count):
        _down_grad[(triton.cdiv(columns, 64), shares)](
            grad, x, out, rows, columns, seed, threshold(p), 1 / (1 - p), share,
            rank, max(_LEAST_RANK, triton.next_power_of_2(rank)), index, count, 64, 64, num_warps=4,
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
