"""Files as OpenAI's clients know them, one list of two kinds: what was uploaded, and what succeeded jobs have measured.

An upload is a dataset. A result file is the artifact `reports/metrics.csv` of a job; its id is made of the job's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Subquery, and_, func, literal, null, or_, select, union_all
from sqlalchemy.orm import Session

from common import datasets
from common.context import Context
from common.db.rows import ArtifactRow, DatasetRow, JobRow
from common.errors import InvalidInput, NotFound, WrongState

RESULTS = "reports/metrics.csv"
Purpose = Literal["fine-tune", "fine-tune-results"]
_JOB, _RESULT = "job_", "res_"


@dataclass(frozen=True)
class File:
    """A file: its id and name, what it is for, its size in bytes, its object, and its times since the epoch."""

    id: str
    name: str
    bytes: int
    created_at: float
    expires_at: float | None
    key: str
    purpose: Purpose


def result_id(job_id: str) -> str:
    """Return the id of a job's result file."""
    return _RESULT + job_id.removeprefix(_JOB)


def with_results(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Return those of `job_ids` that have a result file."""
    measured = select(ArtifactRow.job_id).where(ArtifactRow.name == RESULTS, ArtifactRow.job_id.in_(job_ids))
    return set(session.scalars(measured))


def get(session: Session, tenant: str, file_id: str) -> File:
    """Return a file.

    Raises:
        NotFound: no such file in this tenant.
    """
    every = _files(tenant)
    row = session.execute(select(every).where(every.c.id == file_id)).one_or_none()
    if row is None:
        raise NotFound("there is no such file", param="file_id", hint="GET /v1/files lists those of your key's tenant.")
    return File(**row._mapping)


def page(
    session: Session,
    tenant: str,
    *,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 20,
    newest_first: bool = True,
) -> tuple[list[File], bool]:
    """Return the files that follow the id `after`, and whether there are more.

    Raises:
        InvalidInput: there is no file `after` (any more).
    """
    every = _files(tenant)
    query = select(every)
    if purpose is not None:
        query = query.where(every.c.purpose == purpose)
    if after is not None:
        last = _last(session, tenant, after)
        later = or_(
            every.c.created_at > last.created_at, and_(every.c.created_at == last.created_at, every.c.id > last.id)
        )
        query = query.where(and_(~later, every.c.id != last.id) if newest_first else later)
    order = (every.c.created_at, every.c.id)
    query = query.order_by(*(column.desc() for column in order) if newest_first else order)
    found = [File(**row._mapping) for row in session.execute(query.limit(limit + 1))]
    return found[:limit], len(found) > limit


def _last(session: Session, tenant: str, file_id: str) -> File:
    try:
        return get(session, tenant, file_id)
    except NotFound as error:
        raise InvalidInput("after: there is no such file", param="after", hint="Begin the list anew.") from error


def delete(context: Context, tenant: str, file_id: str) -> None:
    """Remove an upload.

    Raises:
        NotFound: no such file in this tenant.
        WrongState: a job that has not ended reads it, or it is a job's result, which goes with the job.
    """
    with context.read() as session:
        found = get(session, tenant, file_id)
    if found.purpose != "fine-tune":
        raise WrongState(
            "a result file belongs to its job",
            code="result_of_job",
            param="file_id",
            hint=f"DELETE /jobs/{_JOB}{file_id.removeprefix(_RESULT)} removes the job with everything it made.",
        )
    datasets.remove(context, tenant, file_id)


def _files(tenant: str) -> Subquery:
    uploads = select(
        DatasetRow.id.label("id"),
        DatasetRow.name.label("name"),
        DatasetRow.bytes.label("bytes"),
        DatasetRow.created_at.label("created_at"),
        DatasetRow.expires_at.label("expires_at"),
        DatasetRow.key.label("key"),
        literal("fine-tune").label("purpose"),
    ).where(DatasetRow.tenant == tenant)
    results = (
        select(
            literal(_RESULT) + func.substr(JobRow.id, len(_JOB) + 1),
            JobRow.id + "-metrics.csv",
            ArtifactRow.bytes,
            JobRow.finished_at,
            null(),
            ArtifactRow.key,
            literal("fine-tune-results"),
        )
        .join(ArtifactRow, ArtifactRow.job_id == JobRow.id)
        .where(JobRow.tenant == tenant, ArtifactRow.name == RESULTS)
    )
    return union_all(uploads, results).subquery()
