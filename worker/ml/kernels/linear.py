"""Linear layers that read the same input, as one product: frozen weights in one matrix, LoRA adapters beside it.

A 4-bit weight is dequantised for each pass and dropped again. Of the activations, an adapter keeps only the product
with its A, `rank` wide; the input is the caller's, who may keep or recompute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer

from worker.ml.kernels.eight_bit import Narrow, Weight, Whole
from worker.ml.kernels.four_bit import FourBit
from worker.ml.kernels.operations import Operations
from worker.ml.kernels.torch_eight_bit import narrow_matrix

Factors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: its layer and name there, its scale, and the share of the input that dropout drops."""

    layer: LoraLayer
    name: str
    scale: float
    dropout: float

    # Looked up each time: loading a checkpoint puts other parameters in their place.
    @property
    def a(self) -> torch.Tensor:
        """The first matrix [rank, inputs]."""
        return cast(torch.Tensor, self.layer.lora_A[self.name].weight)

    @property
    def b(self) -> torch.Tensor:
        """The second matrix [outputs, rank]."""
        return cast(torch.Tensor, self.layer.lora_B[self.name].weight)


class Group:
    """Linear layers with one input, in the order of their outputs."""

    def __init__(self, layers: list[torch.nn.Module]):
        bases = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers]
        self._bases: list[torch.nn.Linear] = [base for base in bases if isinstance(base, torch.nn.Linear)]
        self.sizes = [base.out_features for base in self._bases]
        self._inputs = self._bases[0].in_features
        found = [adapter_of(layer) for layer in layers]
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        self.adapters = [item for item in found if item is not None]
        self._slices = [slice(at, at + size) for at, size, item in zip(starts, self.sizes, found, strict=True) if item]
        self.rank = self.adapters[0].a.shape[0] if self.adapters else 0
        self.dropout = self.adapters[0].dropout if self.adapters else 0.0
        self._dense: torch.Tensor | None = None
        self._narrow: Narrow | None = None
        self._bias = _joined_bias(self._bases)
        quantized = [base for base in self._bases if isinstance(base, Linear4bit)]
        self._four_bit = FourBit(quantized) if quantized else None
        if self._four_bit is None:
            self._join()

    @property
    def factors(self) -> Factors:
        """The trained matrices: every A, then every B."""
        return (*(item.a for item in self.adapters), *(item.b for item in self.adapters))

    def weight(self) -> Weight:
        """Return the frozen weights as one matrix [outputs, inputs]."""
        return self._narrow or Whole(self._matrix())

    def narrow(self, ops: Operations) -> None:
        """Multiply in 8-bit floats from now on."""
        self._narrow = Narrow(ops, self._matrix().abs().amax(), self.shape, self._narrow_matrix)

    def keep(self) -> None:
        """Hold the weights as the products read them from now on, beside those that evaluation reads."""
        if self._narrow is not None:
            self._narrow.keep()
        else:
            self._dense = self._matrix()

    @property
    def shape(self) -> tuple[int, int]:
        """The outputs and the inputs."""
        return sum(self.sizes), self._inputs

    @property
    def num_weights(self) -> int:
        """The number of frozen weights."""
        return self.shape[0] * self.shape[1]

    def _matrix(self) -> torch.Tensor:
        if self._dense is not None:
            return self._dense
        assert self._four_bit is not None
        return self._four_bit.dense()

    def _narrow_matrix(self, factor: torch.Tensor, turned: bool) -> torch.Tensor:
        if self._dense is not None:
            return narrow_matrix(self._dense, factor, turned=turned)
        assert self._four_bit is not None
        return self._four_bit.narrow(factor, turned=turned)

    def _join(self) -> None:
        # The layers keep views of the one matrix, so nothing is held twice.
        self._dense = torch.cat([base.weight.data for base in self._bases])
        for base, part in zip(self._bases, self._dense.split(self.sizes), strict=True):
            base.weight.data = part

    def cast(self, factors: Factors, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return every A as one matrix [adapters * rank, inputs] and every B, in `dtype`."""
        count = len(self.adapters)
        return torch.cat([a.to(dtype) for a in factors[:count]]), tuple(b.to(dtype) for b in factors[count:])

    def forward(
        self, ops: Operations, x: torch.Tensor, weight: Weight, factors: Factors, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the outputs for `x` [tokens, inputs] side by side, and what the backward pass needs beside `x`."""
        out = weight.product(x, self._bias)
        if not self.adapters:
            return out, None
        a, bs = self.cast(factors, x.dtype)
        low = ops.down(x, a, self.rank, seed, self.dropout)
        for item, at, b, part in zip(self.adapters, self._slices, bs, low.split(self.rank, -1), strict=True):
            out[:, at].addmm_(part, b.T, alpha=item.scale)
        return out, low

    def low_grad(self, grad: torch.Tensor, factors: Factors) -> torch.Tensor | None:
        """Return the gradient of what `forward` kept, from that of its outputs."""
        if not self.adapters:
            return None
        _, bs = self.cast(factors, grad.dtype)
        low = grad.new_empty(len(grad), len(self.adapters) * self.rank)
        for item, at, b, part in zip(self.adapters, self._slices, bs, low.split(self.rank, -1), strict=True):
            torch.mm(grad[:, at], b * item.scale, out=part)
        return low

    def input_grad(
        self,
        ops: Operations,
        grad: torch.Tensor,
        low_grad: torch.Tensor | None,
        weight: Weight,
        factors: Factors,
        seed: int,
    ) -> torch.Tensor:
        """Return the gradient of the input."""
        out = weight.product_back(grad)
        if low_grad is not None:
            a, _ = self.cast(factors, grad.dtype)
            ops.add_up(out, low_grad, a, self.rank, seed, self.dropout)
        return out

    def factor_grads(
        self,
        ops: Operations,
        grad: torch.Tensor,
        low_grad: torch.Tensor | None,
        x: torch.Tensor,
        low: torch.Tensor | None,
        seed: int,
    ) -> list[torch.Tensor]:
        """Return the gradients of `factors`, in their order and dtype."""
        if low is None or low_grad is None:
            return []
        found = ops.down_grad(low_grad, x, self.rank, seed, self.dropout)
        grads = list(found.split(self.rank))
        for item, at, part in zip(self.adapters, self._slices, low.split(self.rank, -1), strict=True):
            grads.append(torch.mm(grad[:, at].T, part) * item.scale)
        return [value.to(factor.dtype) for value, factor in zip(grads, self.factors, strict=True)]


def adapter_of(layer: torch.nn.Module) -> Adapter | None:
    """Return the adapter that is active on `layer`, None where it has none."""
    if not isinstance(layer, LoraLayer):
        return None
    (name,) = layer.active_adapters
    dropout = layer.lora_dropout[name]
    share = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
    return Adapter(layer, name, float(layer.scaling[name]), share)


def _joined_bias(bases: list[torch.nn.Linear]) -> torch.Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    return torch.cat([
        torch.zeros(base.out_features, dtype=base.weight.dtype, device=base.weight.device)
        if base.bias is None else base.bias.data
        for base in bases
    ])  # fmt: skip
