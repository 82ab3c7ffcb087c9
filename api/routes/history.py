"""What happened to a job, what was measured, and its checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api import streams
from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading, WhoCalls
from api.documentation import problem_answers
from common.clock import moment
from common.context import Context
from common.jobs import queries
from common.schemas.checkpoints import Checkpoint, CheckpointList
from common.schemas.jobs import EventList, MetricList

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)])

Cursor = Annotated[int, Query(ge=0, lt=2**63, description="The last page's `next`.")]
_STREAM = "text/event-stream"
_STREAM_DOC: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events in order, or a stream of them", "content": {_STREAM: {"schema": {"type": "string"}}}}
}


@router.get("/{job_id}/events", response_model=EventList, responses=_STREAM_DOC | problem_answers(404))
async def list_events(
    job_id: str,
    request: Request,
    context: Installation,
    who: WhoCalls,
    after: Cursor = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[int | None, Header(ge=0, lt=2**63)] = None,
) -> EventList | Response:
    """List events in order, or follow the job with `Accept: text/event-stream`.

    The stream sends `event`, `metric` and `job` messages, goes on after Last-Event-ID, and closes when the job has
    ended and everything was sent.
    """
    cursor = after if last_event_id is None else last_event_id
    if _STREAM not in accept:
        return await run_in_threadpool(_events, context, who.tenant, job_id, cursor, limit)
    await run_in_threadpool(_check_own, context, who.tenant, job_id)
    messages = streams.follow(context, request.app.state.watcher, who, job_id, cursor)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(messages, headers=headers)


def _check_own(context: Context, tenant: str, job_id: str) -> None:
    with context.read() as session:
        queries.row(session, tenant, job_id)


def _events(context: Context, tenant: str, job_id: str, after: int, limit: int) -> EventList:
    with context.read() as session:
        queries.row(session, tenant, job_id)
        return queries.events(session, job_id, after=after, limit=limit)


@router.get("/{job_id}/metrics", responses=problem_answers(404))
def list_metrics(
    job_id: str,
    session: Reading,
    who: WhoCalls,
    after: Cursor = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> MetricList:
    """List what was logged, in order; of a step that was repeated after a resume, what the last attempt saw."""
    queries.row(session, who.tenant, job_id)
    return queries.metrics(session, job_id, after=after, limit=limit)


@router.get("/{job_id}/checkpoints", responses=problem_answers(404))
def list_checkpoints(job_id: str, session: Reading, who: WhoCalls) -> CheckpointList:
    """List the checkpoints that lie complete in the store, the highest step first."""
    job = queries.row(session, who.tenant, job_id)
    return CheckpointList(
        data=[
            Checkpoint(
                step=row.step,
                attempt=queries.attempt_of(job, row.epoch),
                bytes=row.bytes,
                manifest_sha256=row.manifest_sha256,
                created_at=moment(row.at),
            )
            for row in queries.checkpoints(session, job_id)
        ]
    )
