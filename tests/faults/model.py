"""What the life of jobs should be, in memory and without a database: the state machine compares `lifecycle` with it.

Time is two bits of a job: whether its lease is alive, and whether it waits for its next try.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ENDED = ("succeeded", "failed", "cancelled")
CRASHES_MAX = 3
SHRINK_MAX = 3
# At which fault in a row one of the kind "refused" ends a job.
REFUSED_MAX = 3
WISHED = {"run": "queued", "pause": "paused", "cancel": "cancelled"}

# What a verb answers when it is refused.
LOST, WRONG = "lost", "wrong"


@dataclass(frozen=True)
class Job:
    """One job; `holder` is (worker, epoch) while somebody has a lease, alive or not."""

    id: str
    tenant: str
    priority: int
    order: int
    status: str = "validating"
    desired: str = "run"
    epoch: int = 0
    holder: tuple[str, int] | None = None
    alive: bool = False
    waits: bool = False
    crashes: int = 0
    faults: int = 0
    shrink: int = 0
    checkpoints: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    ends: int = 0

    def but(self, **changes: Any) -> Job:
        """Return a copy with changes; entering an ended state is counted."""
        changed = replace(self, **changes)
        return (
            replace(changed, ends=changed.ends + 1) if changed.status in ENDED and self.status not in ENDED else changed
        )

    def owned_by(self, holder: tuple[str, int], *statuses: str) -> bool:
        """Whether a worker's claim still counts."""
        return self.holder == holder and self.alive and self.status in statuses

    def free(self, **changes: Any) -> Job:
        """Return a copy that nobody holds."""
        return self.but(holder=None, alive=False, **changes)


Outcome = tuple[Any, Job]


# ---- the user's verbs ------------------------------------------------------------------------------------------------


def request_cancel(job: Job) -> Outcome:
    if job.status in ("validating", "queued", "paused"):
        return None, job.free(status="cancelled", desired="cancel")
    if job.status == "running":
        return None, job.but(desired="cancel")
    return (None if job.status == "cancelled" else WRONG), job


def pause(job: Job) -> Outcome:
    if job.status == "queued":
        return None, job.but(status="paused", desired="pause")
    if job.status in ("validating", "running") and job.desired == "run":
        return None, job.but(desired="pause")
    already = job.status == "paused" or (job.status in ("validating", "running") and job.desired == "pause")
    return (None if already else WRONG), job


def resume(job: Job) -> Outcome:
    if job.status == "paused":
        return None, job.but(status="queued", desired="run", waits=False)
    if job.status in ("validating", "running") and job.desired == "pause":
        return None, job.but(desired="run")
    return WRONG, job


# ---- a worker's verbs ------------------------------------------------------------------------------------------------


def renew(job: Job, holder: tuple[str, int]) -> Outcome:
    return (job.desired if job.owned_by(holder, "running", "validating") else LOST), job


def advance(job: Job, holder: tuple[str, int]) -> Outcome:
    return (None if job.owned_by(holder, "running") else LOST), job


def checkpointed(job: Job, holder: tuple[str, int], step: int) -> Outcome:
    if (holder[1], step) in job.checkpoints:
        return None, job
    if not job.owned_by(holder, "running"):
        return LOST, job
    return None, job.but(crashes=0, faults=0, checkpoints=job.checkpoints | {(holder[1], step)})


def publish(job: Job, holder: tuple[str, int]) -> Outcome:
    return (None, job.free(status="succeeded")) if job.owned_by(holder, "running") else (LOST, job)


def fail(job: Job, holder: tuple[str, int]) -> Outcome:
    return (None, job.free(status="failed")) if job.owned_by(holder, "running") else (LOST, job)


def release(job: Job, holder: tuple[str, int]) -> Outcome:
    if not job.owned_by(holder, "running"):
        return LOST, job
    status = WISHED[job.desired]
    return status, job.free(status=status)


def hopeless(job: Job, kind: str) -> bool:
    """Whether one more fault of this kind ends a job."""
    return job.crashes + 1 >= CRASHES_MAX if kind == "crash" else kind == "refused" and job.faults + 1 >= REFUSED_MAX


def fault(job: Job, holder: tuple[str, int], kind: str) -> Outcome:
    if not job.owned_by(holder, "running"):
        return LOST, job
    if (hopeless(job, kind) or (kind == "oom" and job.shrink >= SHRINK_MAX)) and job.desired == "run":
        return "failed", job.free(status="failed")
    status, counter = WISHED[job.desired], {"crash": "crashes", "oom": "shrink"}.get(kind, "faults")
    return status, job.free(status=status, waits=kind != "oom", **{counter: getattr(job, counter) + 1})


def accept(job: Job, holder: tuple[str, int]) -> Outcome:
    if not job.owned_by(holder, "validating"):
        return LOST, job
    return None, job.free(status="paused" if job.desired == "pause" else "queued", crashes=0, faults=0)


def reject(job: Job, holder: tuple[str, int]) -> Outcome:
    return (None, job.free(status="failed")) if job.owned_by(holder, "validating") else (LOST, job)


def postpone(job: Job, holder: tuple[str, int], kind: str) -> Outcome:
    if not job.owned_by(holder, "validating"):
        return LOST, job
    if hopeless(job, kind):
        return None, job.free(status="failed")
    counter = "crashes" if kind == "crash" else "faults"
    return None, job.free(waits=True, **{counter: getattr(job, counter) + 1})


# ---- the sweeper's verb, and time ------------------------------------------------------------------------------------


def expire(job: Job) -> Outcome:
    if job.holder is None or job.alive:
        return None, job
    status = WISHED[job.desired] if job.status == "running" else "validating"
    return status, job.free(status=status)


def taken(job: Job, worker: str) -> Job:
    """Return `job` as it is once `worker` has claimed it."""
    status = "running" if job.status == "queued" else "validating"
    return job.but(status=status, epoch=job.epoch + 1, holder=(worker, job.epoch + 1), alive=True)


def best(jobs: list[Job], status: str) -> Job | None:
    """Return the job that a claim must take: priority, then the tenant with the fewest running jobs, then age."""
    free = [job for job in jobs if job.status == status and not job.waits and not (job.holder and job.alive)]
    running = [job.tenant for job in jobs if job.status == "running"]
    share = {job.tenant: running.count(job.tenant) if status == "queued" else 0 for job in free}
    return min(free, key=lambda job: (-job.priority, share[job.tenant], job.order), default=None)
