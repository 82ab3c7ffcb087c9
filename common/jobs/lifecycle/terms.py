"""The words of a job's life: who owns it, what happened to it, why it failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Claim:
    """Proof that a worker owns a job: every write of a worker carries it. Worthless once the epoch has moved on."""

    job_id: str
    tenant: str
    epoch: int
    worker_id: str
    lease_s: float
    desired: str = "run"


@dataclass(frozen=True)
class Event:
    """An event to append; `level` is info, warning or error."""

    name: str
    message: str
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricPoint:
    """Values logged at a step; `kind` is train or eval."""

    step: int
    values: dict[str, float]
    kind: str = "train"


@dataclass(frozen=True)
class Failure:
    """Why a job failed; `kind` is user_error, infra, oom, diverged, device or crash.

    `attempts`: how many faults in a row (crashes not counted) end the job when this is the last; None: no number.
    `problems` are the first of the `num_problems` rows of a dataset that are wrong, as `JobProblem` shows them.
    """

    kind: str
    code: str
    message: str
    hint: str | None = None
    param: str | None = None
    attempts: int | None = None
    problems: Sequence[dict[str, Any]] = ()
    num_problems: int = 0

    def shown(self) -> dict[str, Any]:
        """Return what the job's record keeps."""
        rows = {"problems": list(self.problems), "num_problems": self.num_problems} if self.problems else {}
        return self.told() | rows

    def told(self) -> dict[str, Any]:
        """Return what an event keeps: all but the single rows."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "param": self.param}

    def ends(self, num_faults: int) -> bool:
        """Whether a job that has met so many faults is given up at this one."""
        return self.attempts is not None and num_faults + 1 >= self.attempts


@dataclass(frozen=True)
class Limits:
    """How many crashes in a row end a job, and the longest pause before another try, in seconds."""

    crash_loop_attempts: int
    retry_max_s: float


@dataclass(frozen=True)
class Published:
    """What an attempt put into the store: the manifest, written last, and every file that it lists."""

    manifest_key: str
    manifest_sha256: str
    artifacts: Sequence[dict[str, Any]]


def backoff_s(num_faults: int, most_s: float) -> float:
    """Return the pause before the next try in seconds: 1, 2, 4, … up to `most_s`."""
    return min(float(2 ** min(num_faults, 20)), most_s)
