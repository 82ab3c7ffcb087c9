"""What a job published: an adapter as one archive, and every file by itself, each behind a signed link."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from starlette.responses import RedirectResponse

from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading, WhoCalls
from api.documentation import problem_answers
from common.db.rows import JobRow
from common.errors import WrongState
from common.jobs import queries
from common.schemas.jobs import Artifact, ArtifactList
from common.schemas.precision import PrecisionRead
from common.storage import keys

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)])

_LINK: dict[int | str, dict[str, Any]] = {307: {"description": "To a signed link of the adapter as .tar.gz"}}


@router.get(
    "/{job_id}/adapter",
    status_code=307,
    response_class=RedirectResponse,
    responses=_LINK | problem_answers(404, 409),
)
def read_adapter(job_id: str, context: Installation, session: Reading, who: WhoCalls) -> RedirectResponse:
    """Redirect to a signed link of the adapter folder as one .tar.gz."""
    job = queries.row(session, who.tenant, job_id)
    if job.manifest_key is None:
        raise WrongState(
            f"a job that is {job.status} has no adapter",
            code="wrong_state",
            param="id",
            hint="Only a job that succeeded has one; GET /jobs/{id}?wait=60 waits for a change.",
        )
    _refuse_export(job)
    if job.spec["method"] == "full":
        raise WrongState(
            "a full fine-tune has no adapter",
            code="no_adapter",
            param="id",
            hint="GET /jobs/{id}/artifacts lists the files of the model; tunery download fetches them.",
        )
    key = job.manifest_key.removesuffix(keys.MANIFEST) + keys.ADAPTER_ARCHIVE
    link = context.store.link(key, filename=f"{job.spec.get('suffix') or job.id}-{keys.ADAPTER_ARCHIVE}")
    return RedirectResponse(link, headers={"Cache-Control": "no-store"})


@router.get("/{job_id}/precision", responses=problem_answers(404, 409))
def read_precision(job_id: str, context: Installation, who: WhoCalls) -> PrecisionRead:
    """Show how each module of the trained model was held: bits, trained, frozen, or not quantisable."""
    with context.read() as session:
        job = queries.row(session, who.tenant, job_id)
        found = [row.key for row in queries.artifacts(session, job_id) if row.name == keys.PRECISION_REPORT]
    _refuse_export(job)
    if not found:
        raise WrongState(
            f"a job that is {job.status} has no precision report",
            code="wrong_state",
            param="id",
            hint="Only a job that succeeded has one; GET /jobs/{id}?wait=60 waits for a change.",
        )
    return PrecisionRead.model_validate_json(context.store.get_bytes(found[0]))


@router.get("/{job_id}/artifacts", responses=problem_answers(404))
def list_artifacts(job_id: str, context: Installation, session: Reading, who: WhoCalls) -> ArtifactList:
    """List every published file with size, SHA-256 and a signed link; none before the job has succeeded.

    Merged models that were exported later (`POST /jobs/{id}/export`) are listed with the others.
    """
    queries.row(session, who.tenant, job_id)
    return ArtifactList(
        data=[
            Artifact(name=row.name, bytes=row.bytes, sha256=row.sha256, url=context.store.link(row.key))
            for row in queries.artifacts(session, job_id)
        ]
    )


def _refuse_export(job: JobRow) -> None:
    if job.source_job is not None:
        raise WrongState(
            f"an export only merges what {job.source_job} trained",
            code="wrong_state",
            param="id",
            hint=f"Ask for that of {job.source_job}.",
        )
