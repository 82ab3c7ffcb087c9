"""What `model` may say: the base, a finished job, or a weighted sum of several: `job_a:0.7+job_b:0.3`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from common import fine_tuned
from common.errors import InvalidInput

_PART = re.compile(r"(?P<job>.+?)(?::(?P<weight>-?(\d+(\.\d*)?|\.\d+)))?")
_MAX_PARTS = 8
_MAX_WEIGHT = 100.0


@dataclass(frozen=True)
class Part:
    """A job's adapter, and how much of it."""

    job_id: str
    weight: float = 1.0


def parts(model: str) -> tuple[Part, ...]:
    """Return the adapters that `model` names, each by its job's id or as `common.fine_tuned` writes it.

    Raises:
        InvalidInput: it is no such name.
    """
    found = tuple(_part(text.strip()) for text in model.split("+"))
    if len(found) > _MAX_PARTS:
        raise _bad(f"it sums {len(found)} adapters; {_MAX_PARTS} are allowed")
    if len({part.job_id for part in found}) < len(found):
        raise _bad("it names a job twice")
    return found


def _part(text: str) -> Part:
    matched = _PART.fullmatch(text)
    if matched is None:
        raise _bad("a part of it is empty")
    if fine_tuned.is_checkpoint(matched["job"]):
        raise _bad("a checkpoint is not served, only the model that a job became")
    weight = float(matched["weight"] or 1.0)
    if not math.isfinite(weight) or abs(weight) > _MAX_WEIGHT:
        raise _bad(f"a weight is beyond {_MAX_WEIGHT:.0f}")
    return Part(fine_tuned.job_id(matched["job"]), weight)


def _bad(why: str) -> InvalidInput:
    return InvalidInput(
        f"model: {why}", param="model", hint="Name the base, a job, or a sum of jobs: job_a:0.7+job_b:0.3."
    )
