"""A user's verbs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from common.db.engine import db_now
from common.db.rows import CheckpointRow
from common.jobs import doorbell, quotas, states
from common.jobs.lifecycle.export import export
from common.jobs.lifecycle.guards import NO_LEASE, add, change, held, jobs, own_job, refuse_unless
from common.jobs.lifecycle.terms import Event
from common.schemas.exports import ExportRequest
from common.schemas.jobs import JobOrder, JobSpec


def submit(
    session: Session,
    tenant: str,
    spec: JobSpec,
    *,
    retry_of: str | None = None,
    clone_of: str | None = None,
    stored: dict[str, Any] | None = None,
) -> str:
    """Insert a job in `validating` and return its id.

    Args:
        retry_of: the job that it repeats, noted as where it comes from.
        clone_of: the job that it is like, noted as well.
        stored: the row of that job has `spec` like this.

    Raises:
        OverQuota, InvalidInput: as `quotas.admit` does.
    """
    quotas.admit(session, tenant, spec.priority)
    origin = {name: job for name, job in (("retry_of", retry_of), ("clone_of", clone_of)) if job}
    event = Event("job.submitted", "The job was accepted and will be checked.", data=origin)
    job_id = add(session, tenant, spec, "validating", event, stored=stored)
    doorbell.after_commit(session, doorbell.PREFLIGHT)
    return job_id


def retry(session: Session, tenant: str, job_id: str) -> str:
    """Submit what a failed or cancelled job asked for once more, and return the new job's id.

    Terminal states never leave, so this is a job of its own. It goes on from the checkpoints of the old one; an export
    begins again.

    Raises:
        WrongState: the job has not ended, or has succeeded.
        NotFound: no such job in this tenant.
    """
    own = own_job(tenant, job_id)
    refuse_unless(session, own, ("failed", "cancelled"), "retry")
    stored, source = session.execute(select(jobs.c.spec, jobs.c.source_job).where(own)).one()
    if source is not None:
        asked = {"export": stored["export"], "priority": stored["priority"]}
        return export(session, tenant, source, ExportRequest.model_validate(asked))[0]
    # As it stands: a checkpoint fits a job by its words, and this version may know fields that those before did not.
    made = submit(session, tenant, JobSpec.model_validate(stored), retry_of=job_id, stored=stored)
    for known in _best_checkpoints(session, job_id):
        # Epoch 0: no attempt of the new job has it.
        copied = {**known, "job_id": made, "epoch": 0}
        session.execute(insert(CheckpointRow).values(copied))
    return made


def _best_checkpoints(session: Session, job_id: str) -> list[dict[str, Any]]:
    """Return the checkpoints of a job as values, of each step the latest attempt's."""
    table = CheckpointRow.__table__
    rows = session.execute(select(table).where(table.c.job_id == job_id).order_by(table.c.step, table.c.epoch))
    return list({row.step: dict(row._mapping) for row in rows}.values())


def reorder(session: Session, tenant: str, job_id: str, order: JobOrder) -> None:
    """Give a job that waits another priority, or another moment before which it is not started.

    Raises:
        WrongState: the job runs or has ended.
        InvalidInput: the priority is above the tenant's highest.
        NotFound: no such job in this tenant.
    """
    values: dict[str, Any] = {}
    if order.priority is not None:
        quotas.check_priority(session, tenant, order.priority)
        values["priority"] = order.priority
    if "not_before" in order.model_fields_set:
        values["hold_until"] = order.not_before.timestamp() if order.not_before else 0.0
    own = own_job(tenant, job_id)
    told = order.model_dump(mode="json", exclude_unset=True)
    event = Event("job.reordered", "Its place in the queue was changed.", data=told)
    if not change(session, [own, jobs.c.status.in_(quotas.WAITING)], values, event):
        refuse_unless(session, own, (), "reorder")
    doorbell.after_commit(session, doorbell.TRAIN)


def request_cancel(session: Session, tenant: str, job_id: str) -> None:
    """Cancel a job that waits, at once; tell the worker of one that runs. A cancelled job stays cancelled.

    Raises:
        WrongState: the job has already succeeded or failed.
        NotFound: no such job in this tenant.
    """
    own = held(session, tenant, job_id)
    ended = {"status": "cancelled", "desired": "cancel", "finished_at": db_now()} | NO_LEASE
    if change(
        session,
        [own, jobs.c.status.in_(states.sources("cancel"))],
        ended,
        Event("job.cancelled", "Cancelled before it ran."),
    ):
        return
    wish = [own, jobs.c.status == "running", jobs.c.desired != "cancel"]
    if change(session, wish, {"desired": "cancel"}, Event("job.cancel_requested", "The worker was told to stop.")):
        return
    refuse_unless(session, own, ("cancelled", "running"), "cancel")


def pause(session: Session, tenant: str, job_id: str) -> None:
    """Put a queued job aside at once; a validating or running one as soon as it can be.

    Raises:
        WrongState: the job has ended or is being cancelled.
        NotFound: no such job in this tenant.
    """
    own = held(session, tenant, job_id)
    if change(
        session,
        [own, jobs.c.status.in_(states.sources("pause"))],
        {"status": "paused", "desired": "pause"},
        Event("job.paused", "Paused before it ran."),
    ):
        return
    wish = [own, jobs.c.status.in_(("validating", "running")), jobs.c.desired == "run"]
    if change(
        session,
        wish,
        {"desired": "pause"},
        Event("job.pause_requested", "The job will pause after its next checkpoint."),
    ):
        return
    wished = session.scalar(select(jobs.c.desired).where(own))
    allowed = ("paused", "validating", "running") if wished == "pause" else ("paused",)
    refuse_unless(session, own, allowed, "pause")


def resume(session: Session, tenant: str, job_id: str) -> None:
    """Queue a paused job again, or withdraw a pause that has not happened yet.

    Raises:
        WrongState: the job is not paused and no pause was asked for.
        NotFound: no such job in this tenant.
    """
    own = held(session, tenant, job_id)
    back = {"status": "queued", "desired": "run", "not_before": 0.0, "queued_at": db_now()}
    if change(
        session,
        [own, jobs.c.status.in_(states.sources("resume"))],
        back,
        Event("job.resumed", "Queued again; it goes on from its last checkpoint."),
    ):
        doorbell.after_commit(session, doorbell.TRAIN)
        return
    withdrawn = [own, jobs.c.status.in_(("validating", "running")), jobs.c.desired == "pause"]
    if not change(session, withdrawn, {"desired": "run"}, Event("job.pause_withdrawn", "The job goes on.")):
        refuse_unless(session, own, (), "resume")
