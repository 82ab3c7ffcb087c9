"""Jobs: submit, list, read, wish, delete."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from pydantic import AwareDatetime, ValidationError
from starlette.concurrency import run_in_threadpool

from api.auth import AuthenticatedRoute, bearer
from api.deps import IdempotencyKey, Installation, Reading, WhoCalls, Writing
from api.documentation import problem_answers
from api.errors import BadBody
from api.freshness import retry_after_s, tag, unchanged
from api.labels import LABELS_DOC, Labels
from api.watching import Watcher
from common import bulk, estimates, keys, removal, submission
from common.context import Context
from common.errors import InvalidInput
from common.jobs import lifecycle, queries, standing, states
from common.jobs.selection import Selection
from common.keys import Caller
from common.schemas.bulk import CancelList, CancelMany
from common.schemas.estimates import JobEstimate
from common.schemas.exports import ExportRequest
from common.schemas.jobs import JobList, JobOrder, JobRead, JobSpec, Status

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)])

Moment = Annotated[
    AwareDatetime | None, Query(description="ISO 8601 with its offset from UTC; the end is not included.")
]
Changes = Annotated[
    dict[str, Any], Body(description="A JSON merge patch (RFC 7396) over what the job asked for in `POST /jobs`.")
]
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "The job is still at that version."}}
_MADE: dict[int | str, dict[str, Any]] = {
    200: {"model": JobRead, "description": "It is made already, or being made: by this job."}
}


@router.post("", status_code=201, responses=problem_answers(409, 413, 415, 429))
def submit_job(
    spec: JobSpec,
    response: Response,
    context: Installation,
    session: Writing,
    who: WhoCalls,
    idempotency_key: IdempotencyKey = None,
) -> JobRead:
    """Submit a job. It is checked by a preflight worker, then queued for a GPU."""
    job_id, is_new = submission.submit(session, context.settings, who, spec, idempotency_key)
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = f"/jobs/{job_id}"
    return queries.shown(queries.row(session, who.tenant, job_id))


@router.post("/estimate", responses=problem_answers(413, 415, 429))
def estimate_job(spec: JobSpec, context: Installation, who: WhoCalls) -> JobEstimate:
    """Tell what a job would take: tokens, steps, memory by part, whether it fits each worker, time. Creates nothing."""
    return estimates.estimate(context, who, spec)


@router.get("", openapi_extra=LABELS_DOC)
def list_jobs(
    session: Reading,
    who: WhoCalls,
    wanted: Labels,
    status: Annotated[list[Status], Query(description="Repeat it for several.")] = [],  # noqa: B006
    model: Annotated[str | None, Query(max_length=256, description="As it was named in the request.")] = None,
    created_after: Moment = None,
    created_before: Moment = None,
    after: Annotated[str | None, Query(pattern=r"^\w{1,40}$", description="The last page's `next`.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobList:
    """List jobs, newest first."""
    if model is not None and "\x00" in model:
        raise InvalidInput("model: contains a NUL", param="model")
    chosen = Selection(status, wanted, model, created_after, created_before)
    return queries.page(session, who.tenant, chosen, after=after, limit=limit)


@router.post("/cancel", responses=problem_answers(413, 415))
def cancel_jobs(body: CancelMany, context: Installation, who: WhoCalls) -> CancelList:
    """Cancel many jobs, by their ids or by a filter, and say of each what happened; with `dry_run`, what would."""
    if body.filter is None:
        return bulk.cancel_listed(context, who.tenant, body.ids or [], dry_run=body.dry_run)
    wanted = body.filter
    chosen = Selection(wanted.status, wanted.metadata, wanted.model, wanted.created_after, wanted.created_before)
    return bulk.cancel_selected(context, who.tenant, chosen, after=body.after, limit=body.limit, dry_run=body.dry_run)


@router.get(
    "/{job_id}",
    response_model=JobRead,
    responses=_UNCHANGED | problem_answers(404),
)
async def read_job(
    job_id: str,
    request: Request,
    response: Response,
    context: Installation,
    who: WhoCalls,
    wait: Annotated[
        int, Query(ge=0, le=60, description="Seconds to wait for a change of a job that has not ended.")
    ] = 0,
    if_none_match: Annotated[str | None, Header()] = None,
) -> JobRead | Response:
    """Read a job, and where it stands in the queue. With `wait`, the answer is held back until the job changes or ends.

    `Retry-After` says when a job that has not ended is worth another look.
    """
    job, version = await run_in_threadpool(_look, context, who, job_id)
    if wait and job.status not in states.TERMINAL and unchanged(job, version, if_none_match, default=True):
        watcher: Watcher = request.app.state.watcher
        with watcher.subscribe(job_id, version) as subscription:
            await subscription.wait(wait)
        job, version = await run_in_threadpool(partial(_look, again=True), context, who, job_id)
    headers = {"ETag": tag(job, version), "Cache-Control": "no-cache"}
    if (again_s := retry_after_s(job)) is not None:
        headers["Retry-After"] = str(again_s)
    if unchanged(job, version, if_none_match, default=False):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return job


def _look(context: Context, who: Caller, job_id: str, *, again: bool = False) -> tuple[JobRead, int]:
    with context.read() as session:
        if again:  # the key may have been revoked meanwhile
            keys.check(session, who)
        row = queries.row(session, who.tenant, job_id)
        return standing.told(session, row), row.version


@router.patch("/{job_id}", responses=problem_answers(404, 409, 415))
def reorder_job(job_id: str, order: JobOrder, session: Writing, who: WhoCalls) -> JobRead:
    """Move a job that waits: give it another `priority`, or another `not_before`; null lifts the latter."""
    lifecycle.reorder(session, who.tenant, job_id, order)
    return standing.told(session, queries.row(session, who.tenant, job_id))


@router.post("/{job_id}/cancel", responses=problem_answers(404, 409))
def cancel_job(job_id: str, session: Writing, who: WhoCalls) -> JobRead:
    """Cancel a job: one that waits at once, a running one as soon as its worker hears of it."""
    lifecycle.request_cancel(session, who.tenant, job_id)
    return queries.shown(queries.row(session, who.tenant, job_id))


@router.post("/{job_id}/pause", responses=problem_answers(404, 409))
def pause_job(job_id: str, session: Writing, who: WhoCalls) -> JobRead:
    """Put a job aside: a queued one at once, a running one at its next checkpoint."""
    lifecycle.pause(session, who.tenant, job_id)
    return queries.shown(queries.row(session, who.tenant, job_id))


@router.post("/{job_id}/resume", responses=problem_answers(404, 409))
def resume_job(job_id: str, session: Writing, who: WhoCalls) -> JobRead:
    """Queue a paused job again; it goes on from its last checkpoint."""
    lifecycle.resume(session, who.tenant, job_id)
    return queries.shown(queries.row(session, who.tenant, job_id))


@router.post("/{job_id}/retry", status_code=201, responses=problem_answers(404, 409, 429))
def retry_job(job_id: str, session: Writing, who: WhoCalls) -> JobRead:
    """Submit what a failed or cancelled job asked for once more, as a new job that goes on from its checkpoints."""
    made = lifecycle.retry(session, who.tenant, job_id)
    return queries.shown(queries.row(session, who.tenant, made))


@router.post("/{job_id}/clone", status_code=201, responses=problem_answers(404, 409, 413, 415, 429))
def clone_job(
    job_id: str,
    changes: Changes,
    response: Response,
    context: Installation,
    session: Writing,
    who: WhoCalls,
    idempotency_key: IdempotencyKey = None,
) -> JobRead:
    """Submit what a job asked for once more, with changes: objects are merged, null sets a field to its default."""
    body = submission.changed(session, who.tenant, job_id, changes)
    try:
        spec = JobSpec.model_validate(body)
    except ValidationError as error:
        raise BadBody(error, body, JobSpec) from error
    made, is_new = submission.submit(session, context.settings, who, spec, idempotency_key, clone_of=job_id)
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = f"/jobs/{made}"
    return queries.shown(queries.row(session, who.tenant, made))


@router.post(
    "/{job_id}/export",
    status_code=201,
    responses=_MADE | problem_answers(404, 409, 415, 429),
)
def export_job(job_id: str, asked: ExportRequest, response: Response, session: Writing, who: WhoCalls) -> JobRead:
    """Merge the adapter of a job that succeeded, in a job of its own: watch, cancel or retry it like any other.

    Its `source_job` is this one, whose artifacts list the merged models beside the adapter as soon as they are there.
    What is published already, or being made, is not made twice.
    """
    made, is_new = lifecycle.export(session, who.tenant, job_id, asked)
    if not is_new:
        response.status_code = 200
    response.headers["Location"] = f"/jobs/{made}"
    return standing.told(session, queries.row(session, who.tenant, made))


@router.delete("/{job_id}", status_code=204, responses=problem_answers(404, 409))
def delete_job(job_id: str, context: Installation, who: WhoCalls) -> None:
    """Delete an ended job, its history and its objects."""
    removal.remove(context, who.tenant, job_id)
