# mypy: ignore-errors
"""The operations of `torch_ops`, each one pass over memory on the card.

Those of an adapter under dropout are in `triton_dropout`, those of heads in `triton_heads`. The bodies of the kernels
are in Triton's language, which has no annotations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from worker.ml.kernels.packed import BLOCK, OUTER
from worker.ml.kernels.triton_dropout import add_up as add_up
from worker.ml.kernels.triton_dropout import down as down
from worker.ml.kernels.triton_dropout import down_grad as down_grad
from worker.ml.kernels.triton_eight_bit import narrow_product as narrow_product
from worker.ml.kernels.triton_eight_bit import narrow_weights as narrow_weights
from worker.ml.kernels.triton_eight_bit import scale_of
from worker.ml.kernels.triton_heads import norm_rotate as norm_rotate
from worker.ml.kernels.triton_heads import norm_rotate_back as norm_rotate_back
from worker.ml.kernels.triton_heads import rotate as rotate
from worker.ml.kernels.triton_heads import rotate_back as rotate_back


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
    scale = scale_of(block, scales, table, factors, offsets, inside, NESTED, OUTER)
    at = block.to(tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    both = tl.load(packed + at, inside[:, None], 0).to(tl.int32)
    first = (tl.load(code + (both >> 4)) * scale[:, None]).to(out.dtype.element_ty)
    second = (tl.load(code + (both & 15)) * scale[:, None]).to(out.dtype.element_ty)
    # Two neighbours are stored as one word.
    word = first.to(tl.uint16, bitcast=True).to(tl.uint32) | (second.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    tl.store(out.to(tl.pointer_type(tl.uint32)) + at, word, inside[:, None])


def dequantize(packed, dtype):
    out = torch.empty(packed.shape, dtype=dtype, device=packed.values.device)
    table, factors, offsets = packed.outer or (packed.code, packed.code, packed.code)
    _dequantize[(triton.cdiv(len(packed.scales), 64),)](
        packed.values, packed.scales, packed.code, table, factors, offsets, out, len(packed.scales),
        packed.outer is not None, BLOCK // 2, OUTER, 64, num_warps=4,
    )  # fmt: skip
    return out


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
