"""Reading jobs: every query carries the tenant, so that another tenant's job does not exist."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from common.clock import moment
from common.db.rows import ArtifactRow, CheckpointRow, EventRow, JobRow, MetricRow
from common.errors import no_job
from common.jobs import states
from common.jobs.selection import EVERY, Selection
from common.schemas.jobs import (
    CheckProgress,
    Event,
    EventList,
    JobError,
    JobList,
    JobRead,
    JobSpec,
    Metric,
    MetricList,
)

# Of what was asked, these may change; the columns of the row say what holds.
_OWN_COLUMNS = ("metadata", "priority", "not_before")


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else moment(seconds)


def row(session: Session, tenant: str, job_id: str) -> JobRow:
    """Return the row of a job.

    Raises:
        NotFound: no such job in this tenant.
    """
    # Postgres takes a NUL for an error.
    own = select(JobRow).where(JobRow.tenant == tenant, JobRow.id == job_id)
    found = None if "\x00" in job_id else session.scalar(own)
    if found is None:
        raise no_job()
    return found


def succeeded_over(session: Session, tenant: str, base_id: str, base_revision: str | None) -> list[JobRow]:
    """Return the succeeded training jobs of the tenant over exactly that base, newest first, a thousand at most."""
    same_base = (JobRow.base_id == base_id, JobRow.base_revision.is_not_distinct_from(base_revision))
    trained = JobRow.source_job.is_(None)
    query = select(JobRow).where(JobRow.tenant == tenant, JobRow.status == "succeeded", trained, *same_base)
    return list(session.scalars(query.order_by(JobRow.id.desc()).limit(1000)))


def owned(session: Session, tenant: str, job_ids: Sequence[str]) -> set[str]:
    """Return those of `job_ids` that are jobs of the tenant."""
    return set(session.scalars(select(JobRow.id).where(JobRow.tenant == tenant, JobRow.id.in_(job_ids))))


def shown(job: JobRow) -> JobRead:
    """Return `job` as it is shown."""
    spec = JobSpec.model_validate(job.spec)
    asked = {name: getattr(spec, name) for name in JobSpec.model_fields if name not in _OWN_COLUMNS}
    return JobRead(
        **asked,
        id=job.id,
        source_job=job.source_job,
        status=job.status,
        desired=job.desired,
        stage=job.stage,
        checked=CheckProgress(**job.checked) if job.checked and _is_being_checked(job) else None,
        step=job.step,
        max_steps=job.max_steps,
        loss=job.loss,
        tokens_per_s=job.tokens_per_s,
        eta_s=job.eta_s,
        base_revision=job.base_revision,
        priority=job.priority,
        not_before=_moment(job.hold_until or None),
        metadata=job.metadata_,
        attempt=job.attempts,
        worker=job.worker_id,
        error=JobError(**job.error) if job.error else None,
        report=job.report or job.preflight,
        created_at=moment(job.created_at),
        queued_at=_moment(job.queued_at),
        started_at=_moment(job.started_at),
        finished_at=_moment(job.finished_at),
    )


def _is_being_checked(job: JobRow) -> bool:
    return job.status == "validating" and job.worker_id is not None


def page(
    session: Session,
    tenant: str,
    chosen: Selection = EVERY,
    *,
    after: str | None = None,
    limit: int = 20,
) -> JobList:
    """Return the chosen jobs, newest first, that come after (are older than) the id `after`."""
    found, more = rows(session, tenant, chosen, after=after, limit=limit)
    data = [_in_list(shown(job)) for job in found]
    return JobList(data=data, has_more=more, next=data[-1].id if more else None)


def _in_list(job: JobRead) -> JobRead:
    # A page of jobs may not weigh what a hundred rows of each do.
    return job.model_copy(update={"error": job.error.model_copy(update={"problems": []})}) if job.error else job


def rows(
    session: Session, tenant: str, chosen: Selection, *, after: str | None = None, limit: int = 20
) -> tuple[list[JobRow], bool]:
    """Return the rows of a page of jobs, and whether there are more."""
    ids = chosen.newest(session, tenant, after=after, limit=limit + 1)
    found = list(session.scalars(select(JobRow).where(JobRow.id.in_(ids)).order_by(JobRow.id.desc())))
    return found[:limit], len(found) > limit


def events(session: Session, job_id: str, *, after: int = 0, limit: int = 100) -> EventList:
    """Return the events of a job whose id is greater than `after`, in order. The caller has checked the tenant."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after).order_by(EventRow.seq)
    found = list(session.scalars(query.limit(limit + 1)))
    data = [_event(item) for item in found[:limit]]
    return EventList(data=data, has_more=len(found) > limit, next=data[-1].id if data else after)


def metrics(session: Session, job_id: str, *, after: int = 0, limit: int = 1000) -> MetricList:
    """Return the metrics of a job after a cursor, in order; of a repeated step only what was logged last."""
    query = _metrics(job_id).where(MetricRow.seq > after).order_by(MetricRow.seq)
    found = list(session.scalars(query.limit(limit + 1)))
    data = [_metric(item) for item in found[:limit]]
    return MetricList(data=data, has_more=len(found) > limit, next=data[-1].id if data else after)


def newest(session: Session, job: JobRow, *, before: int | None, limit: int) -> tuple[list[Event | Metric], bool]:
    """Return events and metrics in one sequence, newest first, below a cursor, and whether there are more."""
    # Not above what the row has counted: what is committed between the two queries would be seen by the second only.
    below = job.seq + 1 if before is None else before
    events_ = select(EventRow).where(EventRow.job_id == job.id, EventRow.seq < below).order_by(EventRow.seq.desc())
    metrics_ = _metrics(job.id).where(MetricRow.seq < below).order_by(MetricRow.seq.desc())
    found: list[Event | Metric] = [_event(item) for item in session.scalars(events_.limit(limit + 1))]
    found += [_metric(item) for item in session.scalars(metrics_.limit(limit + 1))]
    found.sort(key=lambda item: item.id, reverse=True)
    return found[:limit], len(found) > limit


def measured_at(session: Session, job_id: str, steps: Iterable[int]) -> dict[int, list[Metric]]:
    """Return of each step what training had logged last by then, and what was evaluated at it."""
    logged = select(MetricRow.kind, MetricRow.step, func.max(MetricRow.seq)).where(MetricRow.job_id == job_id)
    known = {(kind, step): seq for kind, step, seq in session.execute(logged.group_by(MetricRow.kind, MetricRow.step))}
    trained = sorted(step for kind, step in known if kind == "train")
    wanted: dict[int, list[int]] = {}
    for step in steps:
        by_then = trained[: bisect_right(trained, step)][-1:]
        seqs = [known["train", found] for found in by_then] + [known.get(("eval", step))]
        wanted[step] = [seq for seq in seqs if seq is not None]
    every = [seq for seqs in wanted.values() for seq in seqs]
    query = select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.seq.in_(every))
    values = {row.seq: _metric(row) for row in session.scalars(query)}
    return {step: [values[seq] for seq in seqs] for step, seqs in wanted.items()}


def _metrics(job_id: str) -> Select[MetricRow]:
    # By number and not by attempt: a report whose commit was answered by a broken connection is told twice.
    latest = select(func.max(MetricRow.seq)).where(MetricRow.job_id == job_id).group_by(MetricRow.kind, MetricRow.step)
    return select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.seq.in_(latest))


def _event(row: EventRow) -> Event:
    return Event(id=row.seq, at=moment(row.at), name=row.name, level=row.level, message=row.message, data=row.data)


def _metric(row: MetricRow) -> Metric:
    return Metric(id=row.seq, at=moment(row.at), step=row.step, kind=row.kind, values=row.values)


def artifacts(session: Session, job_id: str) -> list[ArtifactRow]:
    """Return the published files of a job, by name, and with them the merged models that were exported later."""
    # An export's own manifest and reports stay with the export: their names would be those of its source.
    later = select(JobRow.id).where(JobRow.source_job == job_id)
    merged = ArtifactRow.job_id.in_(later) & ArtifactRow.name.startswith("merged")
    query = select(ArtifactRow).where((ArtifactRow.job_id == job_id) | merged)
    rows = list(session.scalars(query.order_by(ArtifactRow.name, ArtifactRow.job_id)))
    # An export that publishes although it was to be cancelled may have been asked for again by then. The first one's
    # counts, and no file of another beside it: the parts of a model go together.
    makers: dict[str, str] = {}
    for row in rows:
        folder = row.name.partition("/")[0]
        makers[folder] = min(row.job_id, makers.get(folder, row.job_id))
    return [row for row in rows if makers[row.name.partition("/")[0]] == row.job_id]


def unfinished_export(session: Session, job_id: str) -> str | None:
    """Return an export of the job's adapter that has not ended, if there is one."""
    live = (JobRow.source_job == job_id, JobRow.status.not_in(states.TERMINAL))
    return session.scalar(select(JobRow.id).where(*live).limit(1))


def attempt_of(job: JobRow, epoch: int) -> int:
    """Return which attempt of a job to train was given the lease `epoch`; 0 for what it was given of another job.

    Leases count its checks too, all of which came before.
    """
    return max(0, epoch - (job.epoch - job.attempts))


def checkpoints(session: Session, job_id: str) -> list[CheckpointRow]:
    """Return the checkpoints of a job, the highest step first; of equal steps the latest attempt's first."""
    order = (CheckpointRow.step.desc(), CheckpointRow.epoch.desc())
    return list(session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(*order)))


def changes(session: Session, job_id: str, *, after: int, limit: int = 200) -> list[tuple[int, str, dict[str, Any]]]:
    """Return events and metrics after a cursor as (cursor, kind, JSON value), in one sequence, for streaming."""
    # Up to what was there before the first of the two queries: what is committed between them could otherwise be seen
    # by the second only, and a cursor would pass over the rest of it.
    until = session.scalar(select(JobRow.seq).where(JobRow.id == job_id)) or 0
    found = [
        (item.id, "event", item.model_dump(mode="json"))
        for item in events(session, job_id, after=after, limit=limit).data
    ]
    query = (
        select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.seq > after).order_by(MetricRow.seq).limit(limit)
    )
    for item in session.scalars(query):
        value = {
            "id": item.seq,
            "at": moment(item.at).isoformat(),
            "step": item.step,
            "kind": item.kind,
            "values": item.values,
        }
        found.append((item.seq, "metric", value))
    return sorted((change for change in found if change[0] <= until), key=lambda change: change[0])[:limit]
