"""One wish for many jobs. Each job is asked by itself, so that what cannot be done to one does not stop the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from common.context import Context
from common.db.rows import JobRow
from common.errors import NotFound, WrongState
from common.jobs import lifecycle, states
from common.jobs.selection import Selection
from common.schemas.bulk import CancelList, CancelOutcome

# Jobs in one transaction: few enough that no row is held for long.
_TOGETHER = 50


def cancel_listed(context: Context, tenant: str, ids: Sequence[str], *, dry_run: bool) -> CancelList:
    """Cancel these jobs, or with `dry_run` only say what that would do."""
    data = [outcome for part in _parts(ids) for outcome in _cancel(context, tenant, part, dry_run)]
    return CancelList(data=data, dry_run=dry_run, has_more=False, next=None)


def cancel_selected(
    context: Context, tenant: str, chosen: Selection, *, after: str | None, limit: int, dry_run: bool
) -> CancelList:
    """Cancel up to `limit` of the chosen jobs that are older than the id `after`, newest first; or only say so."""
    with context.read() as session:
        found = list(session.scalars(chosen.newest(session, tenant, after=after, limit=limit + 1)))
    more = len(found) > limit
    done = cancel_listed(context, tenant, found[:limit], dry_run=dry_run)
    return done.model_copy(update={"has_more": more, "next": found[limit - 1] if more else None})


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _TOGETHER):
        yield ids[start : start + _TOGETHER]


def _cancel(context: Context, tenant: str, ids: Sequence[str], dry_run: bool) -> list[CancelOutcome]:
    if dry_run:
        with context.read() as session:
            return [_foreseen(session, tenant, job_id) for job_id in ids]
    done: dict[str, CancelOutcome] = {}
    with context.write() as session:
        # In one order, so that two who cancel the same jobs do not wait for each other.
        for job_id in sorted(set(ids)):
            done[job_id] = _cancel_one(session, tenant, job_id)
    return [done[job_id] for job_id in ids]


def _cancel_one(session: Session, tenant: str, job_id: str) -> CancelOutcome:
    # Held while it is looked at and asked: of two who cancel it, one hears that it was cancelled already.
    session.execute(select(JobRow.id).where(JobRow.tenant == tenant, JobRow.id == job_id).with_for_update())
    before = _foreseen(session, tenant, job_id)
    try:
        lifecycle.request_cancel(session, tenant, job_id)
    except (NotFound, WrongState):
        return before
    if before.result == "already_cancelled":
        return before
    return _foreseen(session, tenant, job_id, asked=True)


def _foreseen(session: Session, tenant: str, job_id: str, *, asked: bool = False) -> CancelOutcome:
    """Return what a cancel would do to a job, or has done where it was `asked` for."""
    row = session.execute(
        select(JobRow.status, JobRow.desired).where(JobRow.tenant == tenant, JobRow.id == job_id)
    ).one_or_none()
    if row is None:
        return CancelOutcome(id=job_id, result="not_found", status=None)
    if row.status in ("succeeded", "failed"):
        return CancelOutcome(id=job_id, result="ended", status=row.status)
    if row.status == "cancelled" and not asked:
        return CancelOutcome(id=job_id, result="already_cancelled", status=row.status)
    result = "cancelled" if row.status == "cancelled" or row.status in states.sources("cancel") else "cancelling"
    return CancelOutcome(id=job_id, result=result, status=row.status)
