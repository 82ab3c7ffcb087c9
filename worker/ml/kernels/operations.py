"""Chooses who computes what lies between the matrix products: Triton on a card, torch elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol, cast

import torch

from worker.ml.kernels import torch_ops
from worker.ml.kernels.packed import Packed


class Operations(Protocol):
    """The functions of `torch_ops` and `torch_eight_bit`, which document them."""

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor: ...
    def narrow_product(
        self, x: torch.Tensor, matrix: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, exact: bool
    ) -> torch.Tensor: ...
    def narrow_weights(self, packed: Packed, factor: torch.Tensor, *, turned: bool) -> torch.Tensor: ...
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]: ...
    def add_rms_norm(
        self, x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def apply_norm(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor: ...
    def rms_norm_grad(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        residual: torch.Tensor,
    ) -> torch.Tensor: ...
    def rotate(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None: ...
    def rotate_back(
        self, sources: tuple[torch.Tensor, ...], target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> None: ...
    def norm_rotate(
        self, rows: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor: ...
    def norm_rotate_back(
        self,
        sources: tuple[torch.Tensor, ...],
        rows: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None: ...
    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor: ...
    def swiglu_grad(self, grad: torch.Tensor, gate_up: torch.Tensor, *, wanted: bool) -> torch.Tensor | None: ...
    def cross_entropy_grad(
        self, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def down(self, x: torch.Tensor, a: torch.Tensor, rank: int, seed: int, p: float) -> torch.Tensor: ...
    def down_grad(self, grad: torch.Tensor, x: torch.Tensor, rank: int, seed: int, p: float) -> torch.Tensor: ...
    def add_up(
        self, target: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, rank: int, seed: int, p: float
    ) -> None: ...


def has_triton() -> bool:
    """Return whether Triton is installed; torch brings it along with CUDA."""
    return find_spec("triton") is not None


def operations(device: torch.device) -> Operations:
    """Return the operations for tensors on `device`."""
    if device.type == "cuda" and has_triton():
        from worker.ml.kernels import triton_ops

        return cast(Operations, triton_ops)
    return cast(Operations, torch_ops)
