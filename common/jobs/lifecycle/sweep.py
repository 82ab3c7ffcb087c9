"""The sweeper's verbs."""

from __future__ import annotations

from sqlalchemy import case, select
from sqlalchemy.orm import Session

from common.db.engine import db_now
from common.jobs import doorbell, states
from common.jobs.lifecycle.guards import NO_LEASE, book_usage, change, jobs, outcome, wished
from common.jobs.lifecycle.terms import Event


def expire(session: Session, job_id: str) -> str | None:
    """Take a job from a worker whose lease has ended; return its new status.

    None means that the lease lives after all, or that a transaction holds the row: then ask again later.
    """
    late = [jobs.c.id == job_id, jobs.c.lease_expires_at < db_now()]
    # A worker that was frozen in the middle of a transaction holds its row: the others must not wait for that.
    if session.scalar(select(jobs.c.id).where(*late).with_for_update(skip_locked=True)) is None:
        return None
    event = Event("job.lease_expired", "The worker was lost; the job goes on from its last checkpoint.", "warning")
    values = {
        "status": wished(),
        "stage": None,
        "eta_s": None,
        "tokens_per_s": None,
        "finished_at": case((jobs.c.desired == "cancel", db_now()), else_=None),
    } | NO_LEASE
    status = change(session, [*late, jobs.c.status.in_(states.sources("expire"))], values, outcome(event))
    if status is not None:
        book_usage(session, job_id)
    if status == "queued":
        doorbell.after_commit(session, doorbell.TRAIN)
    if status is None and change(session, [*late, jobs.c.status == "validating"], {"stage": None} | NO_LEASE, event):
        doorbell.after_commit(session, doorbell.PREFLIGHT)
        return "validating"
    return status
