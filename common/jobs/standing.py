"""Where a job that waits stands: its position, what it waits for, and when it may start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from common import workers
from common.clock import moment
from common.db.engine import clock, db_month, db_now
from common.db.rows import JobRow, WorkerRow
from common.jobs import doorbell, forecast, line, quotas
from common.jobs.queries import shown
from common.schemas.jobs import JobRead, WaitCode, WaitsFor

# Beyond so many jobs a forecast is worth nothing.
_FORECAST_MAX = 100
# More exact it is not; and a job that waits looks the same for a while.
_FORECAST_STEP_S = 10
_TOKENS = JobRow.preflight["train_tokens"].as_float().label("tokens")


@dataclass(frozen=True)
class Standing:
    """A job's place in the queue; all None for a job that does not wait. `start_at` is in seconds since the epoch."""

    position: int | None = None
    waits_for: WaitsFor | None = None
    start_at: float | None = None


def told(session: Session, job: JobRow) -> JobRead:
    """Return `job` as it is shown alone and not in a list: with its place in the queue."""
    found = of(session, job)
    start = None if found.start_at is None else moment(math.ceil(found.start_at / _FORECAST_STEP_S) * _FORECAST_STEP_S)
    place = {"position": found.position, "waits_for": found.waits_for, "expected_start": start}
    return shown(job).model_copy(update=place)


def of(session: Session, job: JobRow) -> Standing:
    """Return where `job` stands."""
    if job.status == "paused":
        return Standing(waits_for=WaitsFor(code="paused", message="it is paused; resume lets it go on"))
    if job.status not in ("validating", "queued"):
        return Standing()
    now = clock(session)
    if job.not_before > now:
        message = "what it needed was away or broke; it is tried again"
        return Standing(waits_for=_until("retry_pause", message, job.not_before))
    if job.status == "validating":
        return Standing(waits_for=_check(session, job))
    if job.hold_until > now:
        return Standing(waits_for=_until("not_before", "it is not to start before that", job.hold_until))
    return _queued(session, job, now)


def _until(code: WaitCode, message: str, until: float) -> WaitsFor:
    return WaitsFor(code=code, message=message, until=moment(until))


def _check(session: Session, job: JobRow) -> WaitsFor:
    if job.lease_expires_at is not None:
        return WaitsFor(code="checking", message="its dataset and base model are being checked")
    if not _crew(session, doorbell.PREFLIGHT):
        return WaitsFor(code="no_checker", message="no preflight worker is connected; the operator starts one")
    return WaitsFor(code="checkers_busy", message="a preflight worker checks it next, or after the jobs before it")


def _queued(session: Session, job: JobRow, now: float) -> Standing:
    placed = _up_to(session, job)
    if not placed:
        return Standing(waits_for=_quota(session, job.tenant))
    position, others = placed[0].position, placed[1:]
    crew = _crew(session, doorbell.TRAIN)
    if not crew:
        message = "no GPU worker is connected; `tunery worker` starts one"
        return Standing(position, WaitsFor(code="no_worker", message=message))
    start_in_s = _start_in_s(session, others, crew) if position == len(placed) else None
    return Standing(position, _turn(job, position, others, crew), None if start_in_s is None else now + start_in_s)


def _up_to(session: Session, job: JobRow) -> Sequence[Row[Any]]:
    """Return the place of `job` and then those before it, the nearest first; nothing where it is not in line."""
    placed = line.positions()
    # Not a join: SQLite would compare each place with each.
    own = placed.alias("own")
    place = select(own.c.position).where(own.c.id == job.id).scalar_subquery()
    query = (
        select(placed.c.position, placed.c.tenant, placed.c.priority, placed.c.created_at, JobRow.base_id, _TOKENS)
        .join(JobRow, JobRow.id == placed.c.id)
        .where(placed.c.position <= place)
        .order_by(placed.c.position.desc())
        .limit(_FORECAST_MAX + 1)
    )
    return session.execute(query).all()


def _crew(session: Session, kind: str) -> Sequence[Row[Any]]:
    """Return the workers that take jobs, and of each that is busy the job that it runs."""
    heard = WorkerRow.heartbeat_at > db_now() - workers.SILENT_S
    held_s = (db_now() - JobRow.claimed_at).label("held_s")
    runs = (JobRow.worker_id == WorkerRow.id) & (JobRow.status == "running")
    query = (
        select(JobRow.id, JobRow.tenant, JobRow.eta_s, JobRow.base_id, _TOKENS, held_s)
        .select_from(WorkerRow)
        .outerjoin(JobRow, runs)
        .where(WorkerRow.kind == kind, WorkerRow.desired == "run", WorkerRow.state.in_(("idle", "busy")), heard)
    )
    return session.execute(query).all()


def _quota(session: Session, tenant: str) -> WaitsFor:
    quota = quotas.read(session, tenant)
    if quota.max_gpu_hours is not None and quota.gpu_hours >= quota.max_gpu_hours:
        message = f"your tenant has used {quota.gpu_hours:g} of its {quota.max_gpu_hours:g} GPU hours this month"
        return WaitsFor(code="quota_gpu_hours", message=message, until=_next_month(session))
    if quota.max_running is not None:
        message = f"{quota.max_running} jobs of your tenant may run at once; that many run or come before it"
        return WaitsFor(code="quota_running", message=message)
    # Claimed since its row was read.
    return WaitsFor(code="worker_free", message="a worker takes it now")


def _next_month(session: Session) -> datetime:
    begun = moment(session.scalar(select(db_month())) or 0.0)
    return (begun + timedelta(days=32)).replace(day=1)


def _turn(job: JobRow, position: int, others: Sequence[Row[Any]], crew: Sequence[Row[Any]]) -> WaitsFor:
    busy = [worker for worker in crew if worker.id is not None]
    if position <= len(crew) - len(busy):
        return WaitsFor(code="worker_free", message="a worker is free and takes it within seconds")
    own = [worker.id for worker in busy if worker.tenant == job.tenant]
    with_own = f" (with your {', '.join(own)})" if own else ""
    message = f"{len(busy)} of {len(crew)} workers are busy{with_own}; {_count(position - 1)} before it"
    if any(_overtook(other, job) for other in others):
        message += ", some of tenants with fewer jobs running or less use of the workers today"
        return WaitsFor(code="fair_share", message=message)
    return WaitsFor(code="workers_busy", message=message)


def _count(num_jobs: int) -> str:
    return "1 job comes" if num_jobs == 1 else f"{num_jobs or 'no'} jobs come"


def _overtook(other: Row[Any], job: JobRow) -> bool:
    return other.tenant != job.tenant and other.priority == job.priority and other.created_at > job.created_at


def _start_in_s(session: Session, others: Sequence[Row[Any]], crew: Sequence[Row[Any]]) -> float | None:
    known = forecast.speeds(session, {str(row.base_id) for row in (*others, *crew) if row.base_id is not None})

    def duration_s(row: Row[Any]) -> float | None:
        speed = known.get(row.base_id)
        return None if speed is None or row.tokens is None else speed.duration_s(row.tokens)

    def free_in_s(worker: Row[Any]) -> float | None:
        if worker.id is None:
            return 0.0
        if worker.eta_s is not None:
            return float(worker.eta_s)
        whole_s = duration_s(worker)
        return None if whole_s is None or worker.held_s is None else max(0.0, whole_s - worker.held_s)

    return forecast.start_in_s([free_in_s(worker) for worker in crew], [duration_s(row) for row in reversed(others)])
