"""How long rows and runs are: what is settled alike by an estimate, the check, and the trainer."""

from __future__ import annotations

import math

from common.errors import InvalidInput
from common.schemas.hyperparameters import Hyperparameters

DEFAULT_MAX_LENGTH = 1024


def resolve_max_length(values: Hyperparameters, context: int | None) -> int:
    """Return the longest row in tokens: what was asked, or min(1024, the base's context).

    Raises:
        InvalidInput: more than the context was asked for.
    """
    if values.max_length == "auto":
        return min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    if context is not None and values.max_length > context:
        raise InvalidInput(
            f"hyperparameters.max_length is {values.max_length:,}, but the base model's context is {context:,} tokens",
            code="max_length_beyond_context",
            param="hyperparameters.max_length",
            hint=f'use at most {context:,}, or "auto"',
        )
    return values.max_length


def auto_epochs(num_rows: int) -> float:
    """Return what "auto" means: small datasets need to be seen more than once before they change anything."""
    return 3.0 if num_rows < 500 else 2.0 if num_rows < 2000 else 1.0


def total_steps(sequences: int, micro: int, accumulation: int, epochs: float, max_steps: int) -> int:
    """Return the optimizer steps of a run, counted as transformers' Trainer does.

    The last micro-batch and the last accumulation of an epoch may be short.
    """
    if max_steps > 0:
        return max_steps
    per_epoch = max(1, math.ceil(math.ceil(sequences / micro) / accumulation))
    return math.ceil(epochs * per_epoch)
