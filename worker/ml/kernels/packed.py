"""What is stored of 4-bit weights, in bitsandbytes' layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Weights to a scale, and scales to an outer scale, where they are quantised themselves.
BLOCK, OUTER = 64, 256


@dataclass(frozen=True)
class Packed:
    """Weights of `shape` (outputs, inputs), two to a byte of `values`, each an index into `code`.

    `scales` has one for each 64 weights. Where they are quantised themselves, each is an index into the first of
    `outer`, to be multiplied by the second of `outer` and added to its third, of each 256 scales.
    """

    values: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor
    outer: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    shape: tuple[int, int]
