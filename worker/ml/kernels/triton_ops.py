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
def _dequantize(
    packed, scales, code, table, factors, offsets, out, blocks,
    NESTED: tl.constexpr, HALF: tl.constexpr, OUTER: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = tl.load(scales + block, inside, 0)
    if NESTED:
        inner = tl.load(table + scale.to(tl.int32), inside, 0.0)
        scale = inner * tl.load(factors + block // OUTER, inside, 0.0) + tl.load(offsets + block // OUTER, inside, 0.0)
    at = block.to(tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    both = tl.load(packed + at, inside[:, None], 0).to(tl.int32)
    first = (tl.load(code + (both >> 4)) * scale[:, None]).to(out.dtype.element_ty)
    second = (tl.load(code + (both & 15)) * scale[:, None]).to(out.dtype.element_ty)
    # Two neighbours are stored as one word.
    word = first.to(tl.uint16, bitcast=True).to(tl.uint32) | (second.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    tl.store(out.to(tl.pointer_type(tl.uint32)) + at, word, inside[:, None])


def dequantize(packed, scales, code, outer, shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    table, factors, offsets = outer or (code, code, code)
    _dequantize[(triton.cdiv(len(scales), 64),)](
        packed, scales, code, table, factors, offsets, out, len(scales),
        outer is not None, 32, 256, 64, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _turn(source, target, angles, inside, SIZE: tl.constexpr, BACK: tl.constexpr):
    cos1, cos2, sin1, sin2 = angles
    one = tl.load(source, inside, 0.0)
    first, second = one.to(tl.float32), tl.load(source + SIZE // 2, inside, 0.0).to(tl.float32)
    if BACK:
        left, right = first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        left, right = first * cos1 - second * sin1, second * cos2 + first * sin2
    tl.store(target, left.to(one.dtype), inside)
    tl.store(target + SIZE // 2, right.to(one.dtype), inside)


@triton.jit
def _angles(cos, sin, place, SIZE: tl.constexpr):
    half = SIZE // 2
    return (tl.load(cos + place).to(tl.float32), tl.load(cos + place + half).to(tl.float32),
            tl.load(sin + place).to(tl.float32), tl.load(sin + place + half).to(tl.float32))  # fmt: skip


@triton.jit
def _rotate(rows, cos, sin, heads, stride, SIZE: tl.constexpr, HEADS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, SIZE // 2)[None, :]
    place = rows + row * stride + head * SIZE + at
    _turn(place, place, _angles(cos, sin, row * SIZE + at, SIZE), head < heads, SIZE, False)


def rotate(rows, cos, sin):
    count, heads, size = rows.shape
    if size & (size - 1):
        torch_ops.rotate(rows, cos, sin)
        return
    _rotate[(count, triton.cdiv(heads, 8))](rows, cos, sin, heads, rows.stride(0), size, 8, num_warps=2)


@triton.jit
def _rotate_back(query, key, value, target, cos, sin, heads, kv_heads, SIZE: tl.constexpr, HEADS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, SIZE // 2)[None, :]
    whole = heads + 2 * kv_heads
    angles = _angles(cos, sin, row * SIZE + at, SIZE)
    place = target + (row * whole + head) * SIZE + at
    _turn(query + (row * heads + head) * SIZE + at, place, angles, head < heads, SIZE, True)
    inner = head - heads
    inside = (inner >= 0) & (inner < kv_heads)
    _turn(key + (row * kv_heads + inner) * SIZE + at, place, angles, inside, SIZE, True)
    inner = head - heads - kv_heads
    inside = (inner >= 0) & (head < whole)
    source = value + (row * kv_heads + inner) * SIZE + at
    tl.store(place, tl.load(source, inside, 0.0), inside)
    tl.store(place + SIZE // 2, tl.load(source + SIZE // 2, inside, 0.0), inside)


def rotate_back(sources, target, cos, sin):
    query, key, value = sources
    rows, heads, size = query.shape
    if size & (size - 1) or not all(part.is_contiguous() for part in (*sources, target)):
        torch_ops.rotate_back(sources, target, cos, sin)
        return
    grid = rows, triton.cdiv(heads + 2 * key.shape[1], 8)
    _rotate_back[grid](query, key, value, target, cos, sin, heads, key.shape[1], size, 8, num_warps=2)


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
