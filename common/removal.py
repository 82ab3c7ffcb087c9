"""Removing ended jobs. A terminal state never leaves, so what was ended when it was asked still is."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from common.context import Context
from common.db.rows import CheckpointRow, JobRow
from common.errors import WrongState
from common.jobs import queries, states
from common.storage import keys


def remove(context: Context, tenant: str, job_id: str) -> None:
    """Remove an ended job: its history, its row, and its objects but for checkpoints that another job may need.

    Raises:
        NotFound: no such job in this tenant.
        WrongState: it has not ended, or its adapter is being exported.
    """
    with context.read() as session:
        _check_ended(session, tenant, job_id)
        # A retry goes on from checkpoints of this job; they are collected once nothing names them any more.
        others = select(CheckpointRow.prefix).where(CheckpointRow.job_id != job_id)
        needed = tuple(session.scalars(others.where(CheckpointRow.prefix.startswith(keys.job(tenant, job_id)))))
    # Objects first: if the store fails half-way, the job is still there to be deleted once more.
    objects = context.store.objects(keys.job(tenant, job_id))
    context.store.delete([item.key for item in objects if not item.key.startswith(needed)])
    with context.write() as session:
        _delete_rows(session, tenant, job_id)


def _check_ended(session: Session, tenant: str, job_id: str) -> None:
    job = queries.row(session, tenant, job_id)
    if job.status not in states.TERMINAL:
        raise WrongState(
            f"a job that is {job.status} cannot be deleted",
            code="cannot_delete",
            param="id",
            hint="Cancel it first, and wait until it has stopped.",
        )
    if export := queries.unfinished_export(session, job_id):
        raise WrongState(
            f"{export} is merging the adapter of this job",
            code="export_active",
            param="id",
            hint=f"Wait until {export} has ended, or cancel it.",
        )


def _delete_rows(session: Session, tenant: str, job_id: str) -> None:
    # By their foreign keys, everything that belongs to the job goes with its row.
    session.execute(
        delete(JobRow).where(JobRow.tenant == tenant, JobRow.id == job_id, JobRow.status.in_(states.TERMINAL))
    )
