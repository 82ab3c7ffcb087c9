"""The sweeper's verbs."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from common.db.engine import db_now
from common.jobs import doorbell, states
from common.jobs.lifecycle.guards import NO_LEASE, book_usage, change_each, interrupted, jobs, outcome
from common.jobs.lifecycle.terms import Event


def expire(session: Session, job_ids: Sequence[str]) -> dict[str, str]:
    """Take jobs from workers whose leases have ended; return the new status of each by its id.

    One that is missing there has a lease that lives after all, or a transaction holds its row: then ask again later.
    """
    late = jobs.c.lease_expires_at < db_now()
    # A worker that was frozen in the middle of a transaction holds its row: the others must not wait for that.
    free = select(jobs.c.id).where(jobs.c.id.in_(job_ids), late).with_for_update(skip_locked=True)
    ours = [late, jobs.c.id.in_(session.scalars(free).all())]
    event = Event("job.lease_expired", "The worker was lost; the job goes on from its last checkpoint.", "warning")
    ran = change_each(session, [*ours, jobs.c.status.in_(states.sources("expire"))], interrupted(), outcome(event))
    if ran:
        book_usage(session, ran.keys())
    if "queued" in ran.values():
        doorbell.after_commit(session, doorbell.TRAIN)
    checked = change_each(session, [*ours, jobs.c.status == "validating"], {"stage": None} | NO_LEASE, event)
    if checked:
        doorbell.after_commit(session, doorbell.PREFLIGHT)
    return ran | checked
