"""When a job that waits may start: what runs must end first, and what stands before it must run.

Speeds are those that succeeded jobs on the same base have measured. Where one of the parts is not known, neither is
the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from statistics import fmean, median

from sqlalchemy import func, literal_column, select
from sqlalchemy.orm import Session

from common.db.rows import JobRow, UsageRow

_RECENT = 10
_RECENT_ON_CARDS = 100


@dataclass(frozen=True)
class Speed:
    """How fast jobs on a base are: tokens per second of training, and the seconds around it (fetch, load, publish)."""

    tokens_per_s: float
    around_s: float

    def duration_s(self, tokens: float) -> float:
        """Return the seconds for which a job that trains on so many tokens holds a worker."""
        return tokens / self.tokens_per_s + self.around_s


def speeds(session: Session, base_ids: Iterable[str]) -> dict[str, Speed]:
    """Return the speed of the latest jobs on each base; a base on which none succeeded is left out."""
    found = {base_id: _speed(session, base_id) for base_id in set(base_ids)}
    return {base_id: speed for base_id, speed in found.items() if speed is not None}


def _speed(session: Session, base_id: str) -> Speed | None:
    held_s = select(func.sum(UsageRow.ended_at - UsageRow.started_at)).where(UsageRow.job_id == JobRow.id)
    tokens_per_s, train_s = (JobRow.report[name].as_float() for name in ("tokens_per_s", "train_s"))
    query = (
        select(tokens_per_s, train_s, held_s.scalar_subquery())
        .where(JobRow.status == literal_column("'succeeded'"), JobRow.base_id == base_id, JobRow.source_job.is_(None))
        .order_by(JobRow.finished_at.desc())
        .limit(_RECENT)
    )
    measured = [row for row in session.execute(query) if row[0] and None not in row]
    if not measured:
        return None
    return Speed(fmean(row[0] for row in measured), fmean(max(0.0, held - train) for _, train, held in measured))


def speeds_by_device(session: Session, base_id: str, method: str) -> dict[str, Speed]:
    """Return the medians of the latest jobs of a method on a base, by the name of the device that they ran on."""
    held_s = select(func.sum(UsageRow.ended_at - UsageRow.started_at)).where(UsageRow.job_id == JobRow.id)
    query = (
        select(
            JobRow.report["device"].as_string(),
            JobRow.report["tokens_per_s"].as_float(),
            JobRow.report["train_s"].as_float(),
            held_s.scalar_subquery(),
        )
        .where(
            JobRow.status == literal_column("'succeeded'"),
            JobRow.base_id == base_id,
            JobRow.spec["method"].as_string() == method,
        )
        .order_by(JobRow.finished_at.desc())
        .limit(_RECENT_ON_CARDS)
    )
    found: dict[str, list[tuple[float, float]]] = {}
    for device, tokens_per_s, train_s, held in session.execute(query):
        if device and tokens_per_s:
            found.setdefault(device, []).append((tokens_per_s, max(0.0, (held or 0.0) - (train_s or 0.0))))
    return {
        device: Speed(median(rate for rate, _ in jobs), median(around for _, around in jobs))
        for device, jobs in found.items()
    }


def start_in_s(free_in_s: Sequence[float | None], durations_s: Iterable[float | None]) -> float | None:
    """Return in how many seconds the next job after those of `durations_s` is claimed, or None.

    Args:
        free_in_s: when each worker is free; None where that is not known.
        durations_s: how long each job that stands before it will hold a worker, in order.
    """
    free = [math.inf if value is None else value for value in free_in_s]
    if not free:
        return None
    heapify(free)
    for duration_s in durations_s:
        heapreplace(free, free[0] + (math.inf if duration_s is None else duration_s))
    return None if math.isinf(free[0]) else free[0]
