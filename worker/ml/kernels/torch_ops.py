"""What a fused layer computes between its matrix products, in plain torch.

The twin of `triton_ops`: the CPU runs these, and the card's versions are tested against them. Rows are tokens.
"""

from __future__ import annotations

import torch

from worker.ml.kernels.packed import Packed
from worker.ml.kernels.torch_eight_bit import narrow_matrix
from worker.ml.kernels.torch_eight_bit import narrow_product as narrow_product

_WORD = 0xFFFFFFFF
# The constants of MurmurHash3's finaliser and of Fibonacci hashing; `triton_ops` has the same.
_SPREAD, _FIRST, _SECOND, _NEXT = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x3C6EF372


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` [tokens, hidden] normed and scaled, and the reciprocal of each row's norm in fp32 [tokens]."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return weight * (wide * scale[:, None]).to(x.dtype), scale


def add_rms_norm(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `x + other`, and what `rms_norm` makes of it."""
    total = x + other
    return total, *rms_norm(total, weight, eps)


def apply_norm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what `rms_norm` returned for `x`, from the scale that it found."""
    return weight * (x.float() * scale[:, None]).to(x.dtype)


def rms_norm_grad(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of `rms_norm` with regard to `x`, plus `residual`."""
    normed = x.float() * scale[:, None]
    inner = grad.float() * weight.float()
    inner = inner - normed * (inner * normed).mean(-1, keepdim=True)
    return (inner * scale[:, None] + residual.float()).to(x.dtype)


def dequantize(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of `packed` in `dtype`."""
    scales = packed.scales
    if packed.outer is not None:
        table, factors, offsets = packed.outer
        inner = table[scales.int()].view(len(factors), -1)
        scales = (inner * factors[:, None] + offsets[:, None]).flatten()
    halves = torch.stack([packed.values >> 4, packed.values & 15], -1).view(len(scales), -1)
    return (packed.code[halves.int()] * scales[:, None]).to(dtype).view(packed.shape)


def narrow_weights(packed: Packed, factor: torch.Tensor, *, turned: bool) -> torch.Tensor:
    """Return the weights of `packed` times `factor` in 8 bit; `turned`: transposed."""
    return narrow_matrix(dequantize(packed, torch.bfloat16), factor, turned=turned)


def rotate(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn `rows` [tokens, heads, size] by the angles of their positions, in place.

    Of each head the first numbers turn, as many as `cos` and `sin` [tokens, turned] have columns.
    """
    rows[..., : cos.shape[1]] = _turned(rows, cos, sin, back=False)


def rotate_back(sources: tuple[torch.Tensor, ...], target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Write the gradients of query, key and value, before `rotate` turned the first two, side by side to `target`."""
    at = 0
    for index, source in enumerate(sources):
        part = target[:, at : at + source.shape[1]]
        part.copy_(source)
        if index < 2:
            part[..., : cos.shape[1]] = _turned(source, cos, sin, back=True)
        at += source.shape[1]


def norm_rotate(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Return `rows` [tokens, heads, size], each normed, scaled by its row of `weight` [heads, size], and turned."""
    wide = rows.float()
    made = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(rows.dtype)
    rotate(made, cos, sin)
    return made


def norm_rotate_back(
    sources: tuple[torch.Tensor, ...],
    rows: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> None:
    """Overwrite `rows`, query, key and value side by side before `norm_rotate` took the first two, with its gradient.

    Args:
        sources: the gradients of query and key, which it made, and of value.
    """
    query, key, value = sources
    count = query.shape[1] + key.shape[1]
    grad = torch.cat([query, key], 1).float()
    grad[..., : cos.shape[1]] = _turned(grad, cos, sin, back=True)
    wide = rows[:, :count].float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed, inner = wide * scale, grad * weight.float()
    rows[:, :count] = ((inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale).to(rows.dtype)
    rows[:, count:] = value


def _turned(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    first, second = rows[..., : cos.shape[1]].float().chunk(2, -1)
    (cos1, cos2), (sin1, sin2) = (part[:, None].float().chunk(2, -1) for part in (cos, sin))
    if back:
        parts = [first * cos1 + second * sin2, second * cos2 - first * sin1]
    else:
        parts = [first * cos1 - second * sin1, second * cos2 + first * sin2]
    return torch.cat(parts, -1).to(rows.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for `gate_up` [tokens, 2 * inner]."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def swiglu_grad(grad: torch.Tensor, gate_up: torch.Tensor, *, wanted: bool) -> torch.Tensor | None:
    """Overwrite `gate_up` with its gradient, and return what `swiglu` made of it if that is `wanted`."""
    gate, up = gate_up.chunk(2, -1)
    wide, outer = gate.float(), grad.float()
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    made = torch.nn.functional.silu(gate) * up if wanted else None
    inner = outer * up.float() * sigmoid * (1 + wide * (1 - sigmoid))
    up.copy_(outer * silu)
    gate.copy_(inner)
    return made


def cross_entropy_grad(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each row's loss, entropy and whether the target is its likeliest token, all fp32 [tokens].

    `logits` [tokens, vocabulary] are overwritten with the gradient of each row's own loss.
    """
    wide = logits.float()
    logs = torch.log_softmax(wide, -1)
    chances = logs.exp()
    found = logs.gather(-1, targets[:, None])[:, 0]
    entropy = -(chances * logs).sum(-1)
    right = (wide.argmax(-1) == targets).float()
    chances.scatter_add_(-1, targets[:, None], torch.full_like(found, -1)[:, None])
    logits.copy_(chances)
    return -found, entropy, right


def kept(seed: int, index: int, rows: int, columns: int, p: float, device: torch.device) -> torch.Tensor:
    """Return which elements of [rows, columns] dropout leaves, as a function of the seed and the adapter's index."""
    key = (seed + index * _NEXT) & _WORD
    word = torch.arange(rows * columns, device=device) * _SPREAD & _WORD ^ key
    word = ((word ^ word >> 16) * _FIRST + key) & _WORD
    word = ((word ^ word >> 13) * _SECOND) & _WORD
    return ((word ^ word >> 16) >= threshold(p)).view(rows, columns)


def threshold(p: float) -> int:
    """Return the 32-bit word below which an element is dropped."""
    return min(round(p * 2**32), _WORD)


def down(x: torch.Tensor, a: torch.Tensor, rank: int, seed: int, p: float) -> torch.Tensor:
    """Return [tokens, adapters * rank]: each adapter's dropout of `x` times its A; `a` is [adapters * rank, inputs]."""
    if p == 0:
        return x @ a.T
    return torch.cat([_dropped(x, seed, i, p) @ part.T for i, part in enumerate(a.split(rank))], -1)


def down_grad(grad: torch.Tensor, x: torch.Tensor, rank: int, seed: int, p: float) -> torch.Tensor:
    """Return the gradient of `down` with regard to `a`."""
    if p == 0:
        return grad.T @ x
    parts = grad.split(rank, -1)
    return torch.cat([part.T @ _dropped(x, seed, i, p) for i, part in enumerate(parts)])


def add_up(target: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, rank: int, seed: int, p: float) -> None:
    """Add the gradient of `down` with regard to `x` to `target`."""
    if p == 0:
        target.addmm_(grad, a)
        return
    for i, (part, factor) in enumerate(zip(grad.split(rank, -1), a.split(rank), strict=True)):
        target += _dropped(part @ factor, seed, i, p)


def _dropped(x: torch.Tensor, seed: int, index: int, p: float) -> torch.Tensor:
    return x * kept(seed, index, x.shape[0], x.shape[1], p, x.device) / (1 - p)
