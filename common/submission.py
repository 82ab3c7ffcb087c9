"""Taking a job: what every way of asking for one does before and around `lifecycle.submit`."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from common import base_models, datasets, uris
from common.errors import InvalidInput, NotFound, WrongState
from common.jobs import idempotency, lifecycle, queries
from common.keys import Caller
from common.merge_patch import merged
from common.schemas.jobs import JobSpec
from common.settings import Settings


def submit(
    session: Session,
    settings: Settings,
    who: Caller,
    spec: JobSpec,
    idempotency_key: str | None = None,
    *,
    clone_of: str | None = None,
) -> tuple[str, bool]:
    """Submit a job unless this create was answered before; return the job's id and whether it is new.

    `clone_of` is noted as where it comes from, and tells its create from that of the job itself.

    Raises:
        InvalidInput: the base model or a dataset is not there, or may not be read.
        WrongState: the idempotency key made a job from another body.
    """
    create = idempotency.Create(who, spec, idempotency_key, settings.repeat_window_s, clone_of)
    # Before the checks: what the first call named may be gone by now.
    first = idempotency.answered(session, create)
    if first is not None:
        return first, False
    check(session, settings, who.tenant, spec)
    job_id = lifecycle.submit(session, who.tenant, spec, clone_of=clone_of)
    idempotency.remember(session, create, job_id)
    return job_id, True


def changed(session: Session, tenant: str, job_id: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return what a job asked for, with `changes` merged over it: the body of another job, not yet checked.

    Raises:
        NotFound: no such job in this tenant.
        WrongState: it is an export, which trains nothing.
    """
    job = queries.row(session, tenant, job_id)
    if job.source_job is not None:
        raise WrongState(
            f"an export only merges what {job.source_job} trained",
            code="cannot_clone",
            param="id",
            hint=f"Clone {job.source_job}, with `export` for what it shall make.",
        )
    body: dict[str, Any] = merged(job.spec, changes)
    return body


def check(session: Session, settings: Settings, tenant: str, spec: JobSpec) -> None:
    """Raise InvalidInput if the base model or a dataset of `spec` is not there, or may not be read."""
    base_models.check(spec.model, settings)
    for param, uri in (("dataset", spec.dataset), ("validation_dataset", spec.validation_dataset)):
        if uri is not None:
            _check_dataset(session, settings, tenant, uri, param)


def _check_dataset(session: Session, settings: Settings, tenant: str, uri: str, param: str) -> None:
    parsed = uris.parse(uri, settings, param)
    if parsed.scheme != "dataset":
        return
    try:
        datasets.keep(session, tenant, parsed.place)
    except NotFound as error:
        raise InvalidInput(
            f"{param}: there is no dataset {parsed.place}",
            param=param,
            code="dataset_not_found",
            hint="GET /datasets lists the uploads; POST /datasets makes one.",
        ) from error
