"""The frozen weights of a group as its products read them: as they are, or in 8-bit floats.

Cards from 2022 on multiply e4m3 numbers twice as fast as 16-bit ones. Weights get one scale for the whole matrix, a
power of two, so that the product and its gradient see the same weights; activations and gradients get one for each
token (Micikevicius et al., "FP8 Formats for Deep Learning", 2022, for the format; NVIDIA's Transformer Engine for exact
sums in the backward pass only). A product's error is some 4 % of its size, that of
NF4 weights some 9 % (random normal numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from worker.ml.kernels.operations import Operations
from worker.ml.kernels.torch_eight_bit import LARGEST, LEAST

# The first generation of cards that multiplies 8-bit floats (Ada; Hopper is 9.0).
_GENERATION = (8, 9)
# What their products need the sides of a matrix to be a multiple of.
_MULTIPLE = 16


class Weight(Protocol):
    """Frozen weights [outputs, inputs]."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the outputs [tokens, outputs] for `x` [tokens, inputs]."""
        ...

    def product_back(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient [tokens, inputs] of the inputs, from that of the outputs."""
        ...


@dataclass(frozen=True)
class Whole:
    """Weights in the dtype of the activations."""

    matrix: torch.Tensor

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x` times the transposed weights."""
        return torch.mm(x, self.matrix.T) if bias is None else torch.addmm(bias, x, self.matrix.T)

    def product_back(self, grad: torch.Tensor) -> torch.Tensor:
        """Return `grad` times the weights."""
        return torch.mm(grad, self.matrix)


class Narrow:
    """Weights in 8 bit.

    Args:
        largest: the largest absolute weight.
        shape: the outputs and the inputs.
        make: returns the weights times a factor in 8 bit, transposed or not.
    """

    def __init__(
        self,
        ops: Operations,
        largest: torch.Tensor,
        shape: tuple[int, int],
        make: Callable[[torch.Tensor, bool], torch.Tensor],
    ):
        self._ops, self._make = ops, make
        self._factor = torch.exp2(torch.floor(torch.log2(LARGEST / largest.float().clamp(min=LEAST)))).reshape(1)
        # The card wants a scale for each column of a product, for each of which making them would be a launch more.
        self._scales = [self._factor.reciprocal().expand(1, side).contiguous() for side in shape]
        self._kept: dict[bool, torch.Tensor] = {}

    def keep(self) -> None:
        """Hold the weights from now on, both ways round: two bytes a weight."""
        self._kept = {turned: self._make(self._factor, turned) for turned in (False, True)}

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x` times the transposed weights."""
        return self._ops.narrow_product(x, self._matrix(turned=False), self._scales[0], bias, exact=False)

    def product_back(self, grad: torch.Tensor) -> torch.Tensor:
        """Return `grad` times the weights."""
        return self._ops.narrow_product(grad, self._matrix(turned=True), self._scales[1], None, exact=True)

    def _matrix(self, *, turned: bool) -> torch.Tensor:
        return self._kept[turned] if self._kept else self._make(self._factor, turned)


def why_not(sizes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why matrices of `sizes` are not multiplied in 8 bit on `device`; None if they are."""
    if any(side % _MULTIPLE for size in sizes for side in size):
        return f"the sides of its weights are not all multiples of {_MULTIPLE}"
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < _GENERATION:
        return "the card has no 8-bit floats"
    return None if dtype == torch.bfloat16 else f"products are in {dtype}, not in bfloat16"
