"""Products in 8-bit floats (e4m3: four bits of exponent, three of mantissa), in plain torch; see `eight_bit`."""

from __future__ import annotations

import torch

EIGHT_BIT = torch.float8_e4m3fn
# The largest finite number of that format.
LARGEST = 448.0
# A row of zeros has a scale too.
LEAST = 1e-12


def narrow(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of `x` in 8 bit, and the fp32 scale [rows, 1] that each is to be multiplied by."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST) / LARGEST
    return (wide / scale).to(EIGHT_BIT), scale


def narrow_product(
    x: torch.Tensor, matrix: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, exact: bool
) -> torch.Tensor:
    """Return `x` [tokens, k] times the transpose of the 8-bit `matrix` [n, k], plus `bias`, in the dtype of `x`.

    Args:
        scale: what each row of `matrix` is to be multiplied by, [1, n] in fp32.
        exact: add up in fp32. Otherwise a card may use its tensor cores' own, narrower sums, which are faster.
    """
    rows, scales = narrow(x)
    made = rows.float() @ matrix.float().T * scales * scale
    return (made if bias is None else made + bias.float()).to(x.dtype)


def narrow_matrix(matrix: torch.Tensor, factor: torch.Tensor, *, turned: bool) -> torch.Tensor:
    """Return `matrix` times `factor`, a power of two, in 8 bit; `turned`: transposed."""
    made = (matrix * factor.to(matrix.dtype)).to(EIGHT_BIT)
    return made.T.contiguous() if turned else made
