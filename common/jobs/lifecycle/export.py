"""Merged models of a finished job: a job of their own, which needs no check and whose source never changes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from common.db.engine import db_now
from common.db.rows import ArtifactRow
from common.errors import InvalidInput, WrongState, no_job
from common.jobs import doorbell, quotas, states
from common.jobs.lifecycle.guards import add, held, jobs
from common.jobs.lifecycle.terms import Event
from common.schemas.exports import ExportRequest, check_exports
from common.schemas.jobs import JobSpec

# What an export takes over from its source: the base is pinned, the data is known.
_PINNED = ("base_id", "base_revision", "dataset_sha256")


def export(session: Session, tenant: str, job_id: str, asked: ExportRequest) -> tuple[str, bool]:
    """Queue the merged models that are asked for; return the id of the job that makes them, and whether it is new.

    What is published already, or being made, is not made twice: where nothing is left, that job is the answer.

    Raises:
        WrongState: the job has no adapter: it has not succeeded, trained every weight, or is an export itself.
        InvalidInput: no job of its method makes that form; or as `quotas.admit` does.
        OverQuota: as `quotas.admit` does.
        NotFound: no such job in this tenant.
    """
    # Held, so that of two that ask at once the second finds what the first has queued.
    source = _source(session, job_id, held(session, tenant, job_id))
    spec = JobSpec.model_validate(source["spec"])
    try:
        check_exports(asked.export, spec.method)
    except ValueError as error:
        raise InvalidInput(str(error), param="export", code="bad_export") from error
    makers = _makers(session, job_id)
    missing = [form for form in asked.export if form not in makers]
    if not missing:
        return max(makers[form] for form in asked.export), False
    quotas.admit(session, tenant, asked.priority)
    stored = source["spec"] | {"export": missing, "priority": asked.priority, "not_before": None}
    made = add(
        session,
        tenant,
        JobSpec.model_validate(stored),
        "queued",
        Event("job.submitted", f"Merging the adapter of {job_id}; waiting for a GPU worker.", data={"source": job_id}),
        stored=stored,
        queued_at=db_now(),
        source_job=job_id,
        **{name: source[name] for name in _PINNED},
    )
    doorbell.after_commit(session, doorbell.TRAIN)
    return made, True


def _source(session: Session, job_id: str, own: ColumnElement[bool]) -> dict[str, Any]:
    columns = (jobs.c.status, jobs.c.spec, jobs.c.source_job, *(jobs.c[name] for name in _PINNED))
    row = session.execute(select(*columns).where(own)).mappings().one_or_none()
    if row is None:
        raise no_job(f"there is no job {job_id}")
    if row["source_job"] is not None:
        raise WrongState(
            "this job is an export itself",
            code="cannot_export",
            param="id",
            hint=f"Export the job whose adapter it merged: {row['source_job']}.",
        )
    if row["status"] != "succeeded":
        raise WrongState(
            f"a job that is {row['status']} has no adapter to export",
            code="cannot_export",
            param="id",
            hint="Only a job that succeeded has one; name what else it shall make in `export` when you submit it.",
        )
    if row["spec"]["method"] == "full":
        raise WrongState(
            "a full fine-tune has no adapter to merge: it has published a whole model",
            code="no_adapter",
            param="id",
            hint="GET /jobs/{id}/artifacts lists the files of the model; tunery download fetches them.",
        )
    return dict(row)


def _makers(session: Session, job_id: str) -> dict[str, str]:
    """Return which job has made or will make each form: the source itself, or an export of it."""
    published = select(ArtifactRow.name).where(
        ArtifactRow.job_id == job_id, ArtifactRow.name.like("merged%/config.json")
    )
    makers = {name.partition("/")[0]: job_id for name in session.scalars(published)}
    # One that is being cancelled will make nothing.
    makes = or_(jobs.c.status == "succeeded", and_(jobs.c.status.not_in(states.TERMINAL), jobs.c.desired != "cancel"))
    exports = select(jobs.c.id, jobs.c.spec).where(jobs.c.source_job == job_id, makes)
    for row in session.execute(exports):
        makers |= dict.fromkeys(row.spec["export"], row.id)
    return makers
