"""Fine-tuned models and their names, one form everywhere: `ft:BASE:TENANT:SUFFIX:JOB`, as OpenAI writes them.

The suffix is empty where none was asked for. Only the job counts when a name is read; a job's id alone names its model
too. A checkpoint's name is the model's with `:ckpt-step-STEP` after it.
"""

from __future__ import annotations

import re

from sqlalchemy import select
from sqlalchemy.orm import Session

from common.db.rows import JobRow
from common.errors import NotFound
from common.jobs import queries

_PREFIX = "ft:"
_CHECKPOINT = re.compile(r":ckpt-step-\d+\Z", re.ASCII)
_LISTED_MAX = 1000


def name(job: JobRow) -> str:
    """Return the name of the model that `job` makes."""
    base = job.model.partition("@")[0]
    return f"{_PREFIX}{base}:{job.tenant}:{job.spec.get('suffix') or ''}:{job.id}"


def checkpoint_name(job: JobRow, step: int) -> str:
    """Return the name of the model as it was after `step`: the model's own name where that step is what it became."""
    report = job.report or {}
    published = job.status == "succeeded" and step == report.get("published_step", report.get("steps"))
    return name(job) if published else f"{name(job)}:ckpt-step-{step}"


def is_fine_tuned(model: str) -> bool:
    """Return whether `model` is written as a fine-tuned model's name."""
    return model.startswith(_PREFIX)


def is_checkpoint(model: str) -> bool:
    """Return whether `model` is the name of a checkpoint."""
    return is_fine_tuned(model) and _CHECKPOINT.search(model) is not None


def job_id(model: str) -> str:
    """Return the id of the job that `model` names."""
    return model.rpartition(":")[2] if is_fine_tuned(model) else model


def get(session: Session, tenant: str, model: str) -> JobRow:
    """Return the succeeded job that made `model`.

    Raises:
        NotFound: no such model in this tenant.
    """
    try:
        job = queries.row(session, tenant, job_id(model))
    except NotFound:
        job = None
    if job is None or job.status != "succeeded" or job.source_job is not None:
        raise NotFound(
            f"the model {model[:300]!r} does not exist",
            code="model_not_found",
            param="model",
            hint="GET /v1/models lists those that there are.",
        )
    return job


def listed(session: Session, tenant: str) -> list[JobRow]:
    """Return the succeeded jobs of the tenant that trained a model, newest first, a thousand at most."""
    own = (JobRow.tenant == tenant, JobRow.status == "succeeded", JobRow.source_job.is_(None))
    return list(session.scalars(select(JobRow).where(*own).order_by(JobRow.id.desc()).limit(_LISTED_MAX)))
