"""Removing ended jobs. A terminal state never leaves, so what was ended when it was asked still is."""

from __future__ import annotations

from sqlalchemy import delete
from sqlalchemy.orm import Session

from common.db.rows import JobRow
from common.errors import WrongState
from common.jobs import queries, states


def check_ended(session: Session, tenant: str, job_id: str) -> None:
    """Raise unless the job has ended.

    Raises:
        NotFound: no such job in this tenant.
        WrongState: it has not ended.
    """
    job = queries.row(session, tenant, job_id)
    if job.status not in states.TERMINAL:
        raise WrongState(
            f"a job that is {job.status} cannot be deleted",
            code="cannot_delete",
            param="id",
            hint="Cancel it first, and wait until it has stopped.",
        )


def delete_rows(session: Session, tenant: str, job_id: str) -> None:
    """Remove the row of an ended job and, by their foreign keys, everything that belongs to it."""
    session.execute(
        delete(JobRow).where(JobRow.tenant == tenant, JobRow.id == job_id, JobRow.status.in_(states.TERMINAL))
    )
