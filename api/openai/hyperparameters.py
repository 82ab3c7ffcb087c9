"""Three hyperparameters in OpenAI's words, and what they are in Tunery's.

`n_epochs` is `num_train_epochs`. `batch_size` counts the rows of an optimizer step: `per_device_train_batch_size` times
`gradient_accumulation_steps`. `learning_rate_multiplier` is a factor of the rate that the method has by itself. Each is
"auto" where it is not given: the worker chooses, and the job then shows what it chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from common.db.rows import JobRow
from common.errors import InvalidInput
from common.schemas.hyperparameters import Hyperparameters
from common.schemas.methods import default_learning_rate
from common.schemas.values import Auto, Strict

_MICRO_BATCH_MAX = 4
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Of each: the names of Tunery's that say the same.
_SAME = {"n_epochs": ("num_train_epochs",), "batch_size": _BATCH, "learning_rate_multiplier": ("learning_rate",)}

Epochs = Annotated[int, Field(ge=1, le=1000)] | Auto | None
BatchSize = Annotated[int, Field(ge=1, le=4096)] | Auto | None
Multiplier = Annotated[float, Field(gt=0, le=5000)] | Auto | None


class SupervisedHyperparameters(Strict):
    """`method.supervised.hyperparameters`."""

    n_epochs: Epochs = None
    batch_size: BatchSize = None
    learning_rate_multiplier: Multiplier = None


class AnyHyperparameters(Hyperparameters):
    """`hyperparameters`: OpenAI's own, where its older clients send them, and Tunery's, by `extra_body`."""

    n_epochs: Epochs = None
    batch_size: BatchSize = None
    learning_rate_multiplier: Multiplier = None


class ShownHyperparameters(BaseModel):
    """What a job trains with, in OpenAI's words; null where its words cannot say it."""

    n_epochs: int | Auto | None
    batch_size: int | Auto | None
    learning_rate_multiplier: float | Auto | None


def translated(method: str, supervised: Mapping[str, Any], either: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a job.

    Args:
        method: the job's method, which has a rate of its own.
        supervised: what `method.supervised.hyperparameters` gives.
        either: what `hyperparameters` gives.

    Raises:
        InvalidInput: one thing is said twice, and differently.
    """
    asked = {name: value for name, value in either.items() if name not in _SAME}
    for name, same in _SAME.items():
        value = _said_once(name, supervised, either)
        both = [known for known in same if known in asked]
        if value is not None and both:
            raise InvalidInput(
                f"hyperparameters.{both[0]}: {name} says the same; give one of them", param=f"hyperparameters.{both[0]}"
            )
        if not both:
            asked |= _in_own_words(name, value or "auto", method)
    return asked


def _said_once(name: str, supervised: Mapping[str, Any], either: Mapping[str, Any]) -> Any:
    values = [part[name] for part in (supervised, either) if part.get(name) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise InvalidInput(
            f"hyperparameters.{name}: method.supervised.hyperparameters says otherwise; give one of them",
            param=f"hyperparameters.{name}",
        )
    return values[0] if values else None


def _in_own_words(name: str, value: Any, method: str) -> dict[str, Any]:
    if name == "batch_size":
        return dict(zip(_BATCH, _split(value), strict=True))
    if name == "learning_rate_multiplier" and value != "auto":
        return {"learning_rate": value * default_learning_rate(method)}
    return {_SAME[name][0]: value}


def _split(batch_size: int | Auto) -> tuple[int | Auto, int | Auto]:
    """Return the rows of a micro-batch, four at most, and how many of them make up the batch."""
    if batch_size == "auto":
        return "auto", "auto"
    micro = next(size for size in range(_MICRO_BATCH_MAX, 0, -1) if batch_size % size == 0)
    return micro, batch_size // micro


def shown(job: JobRow) -> ShownHyperparameters:
    """Return what `job` trains with: what was asked and, once it is checked, what "auto" came to."""
    asked, chosen = Hyperparameters.model_validate(job.spec["hyperparameters"]), job.preflight or {}
    micro, accumulation = asked.per_device_train_batch_size, asked.gradient_accumulation_steps
    batch: Any = "auto" if "auto" in (micro, accumulation) else int(micro) * int(accumulation)
    rate: Any = 1.0 if job.preflight else "auto"
    if asked.learning_rate != "auto":
        # What is shown is what was asked for, without the last digits of a division.
        rate = float(f"{asked.learning_rate / default_learning_rate(job.spec['method']):.12g}")
    return ShownHyperparameters(
        n_epochs=_whole(chosen.get("epochs", asked.num_train_epochs)),
        batch_size=chosen.get("rows_per_step", batch),
        learning_rate_multiplier=rate,
    )


def _whole(epochs: float | Auto) -> int | Auto | None:
    if epochs == "auto":
        return "auto"
    return int(epochs) if epochs == int(epochs) else None
