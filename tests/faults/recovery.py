"""How long it took from a fault to the next progress of the job that it met, or, where it met no single job, of any."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import Any

from tests.faults.evidence import Row, Step

# After these the attempt that was met is over: only another one, or the job's end, is progress.
_ENDS_ATTEMPT = {("kill", "trainer"), ("kill", "worker"), ("drain", "worker")}
_RESTS = {"paused", "cancelled"}


def recoveries(faults: list[Row], trail: list[Step], audit: dict[str, list[Row]]) -> dict[str, list[float]]:
    """Return seconds of recovery by kind of fault. Jobs that their user stopped meanwhile do not count."""
    marks = sorted([step.at for step in trail] + [at for job in audit for at, _ in _turns(audit[job])])
    found: dict[str, list[float]] = defaultdict(list)
    for fault in faults:
        seconds = _of_job(fault, trail, audit) if fault["job"] else _of_any(fault, marks)
        if seconds is not None:
            found[f"{fault['what']} {fault['whom']}"].append(round(seconds, 3))
    return dict(found)


def _turns(changes: list[Row]) -> list[tuple[float, str]]:
    """Return when a job's status changed, and to what."""
    return [
        (row["at"], row["status"]) for row in changes if row["what"] == "changed" and row["status"] != row["old_status"]
    ]


def _of_any(fault: dict[str, Any], marks: list[float]) -> float | None:
    later = bisect_right(marks, fault["at"])
    return marks[later] - fault["at"] if later < len(marks) else None


def _of_job(fault: dict[str, Any], trail: list[Step], audit: dict[str, list[Row]]) -> float | None:
    at, job, epoch = fault["at"], fault["job"], fault["epoch"]
    least = epoch + 1 if (fault["what"], fault["whom"]) in _ENDS_ATTEMPT else epoch
    steps = [step.at for step in trail if step.job == job and step.at > at and step.epoch >= least]
    turns = [(when, status) for when, status in _turns(audit.get(job, [])) if when > at]
    ends = [when for when, status in turns if status in ("succeeded", "failed")]
    rests = [when for when, status in turns if status in _RESTS]
    best = min([*steps, *ends], default=None)
    if best is None or any(rest < best for rest in rests):
        return None
    return best - at


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of `values` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]
