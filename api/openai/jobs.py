"""`/v1/fine_tuning/jobs`: jobs, their events and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from sqlalchemy.orm import Session

from api.auth import AuthenticatedRoute, bearer
from api.deps import IdempotencyKey, Installation, Reading, WhoCalls, Writing
from api.documentation import openai_answers
from api.labels import LABELS_DOC, LabelsOrNone
from api.openai import job_objects
from api.openai.job_create import JobCreate, asked, openai_words
from api.openai.job_objects import CheckpointPage, EventPage, FineTuningJob, FineTuningJobPage
from api.openai.values import After, ends
from common import files, submission
from common.db.engine import clock
from common.db.rows import JobRow
from common.jobs import lifecycle, queries
from common.jobs.selection import Selection
from common.keys import Caller

router = APIRouter(
    prefix="/fine_tuning/jobs",
    tags=["openai: fine-tuning"],
    route_class=AuthenticatedRoute,
    dependencies=[Depends(bearer)],
)

Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("", responses=openai_answers(413, 415, 429))
def create_fine_tuning_job(
    body: JobCreate,
    context: Installation,
    session: Writing,
    who: WhoCalls,
    idempotency_key: IdempotencyKey = None,
) -> FineTuningJob:
    """Create a job. The same body again, as clients repeat it by themselves, is answered with the first job."""
    spec = asked(body)
    with openai_words():
        job_id, _ = submission.submit(session, context.settings, who, spec, idempotency_key)
    return _shown(session, who, job_id)


@router.get("", openapi_extra=LABELS_DOC)
def list_fine_tuning_jobs(
    session: Reading,
    who: WhoCalls,
    wanted: LabelsOrNone,
    after: After = None,
    limit: Limit = 20,
) -> FineTuningJobPage:
    """List jobs, newest first. `metadata=null` asks for those without any."""
    rows, more = queries.rows(session, who.tenant, Selection(metadata=wanted, exports=False), after=after, limit=limit)
    return FineTuningJobPage(data=_all_shown(session, rows), has_more=more, **ends([row.id for row in rows]))


@router.get("/{job_id}", responses=openai_answers(404))
def retrieve_fine_tuning_job(job_id: str, session: Reading, who: WhoCalls) -> FineTuningJob:
    """Read a job."""
    return _shown(session, who, job_id)


@router.post("/{job_id}/cancel", responses=openai_answers(404))
def cancel_fine_tuning_job(job_id: str, session: Writing, who: WhoCalls) -> FineTuningJob:
    """Cancel a job: one that waits at once; one that runs says `running` until its worker has stopped."""
    return _wished(lifecycle.request_cancel, session, who, job_id)


@router.post("/{job_id}/pause", responses=openai_answers(404))
def pause_fine_tuning_job(job_id: str, session: Writing, who: WhoCalls) -> FineTuningJob:
    """Put a job aside: one that waits at once, one that runs at its next checkpoint. It then says `queued`."""
    return _wished(lifecycle.pause, session, who, job_id)


@router.post("/{job_id}/resume", responses=openai_answers(404))
def resume_fine_tuning_job(job_id: str, session: Writing, who: WhoCalls) -> FineTuningJob:
    """Queue a paused job again; it goes on from its last checkpoint."""
    return _wished(lifecycle.resume, session, who, job_id)


@router.get("/{job_id}/events", responses=openai_answers(404))
def list_fine_tuning_events(
    job_id: str, session: Reading, who: WhoCalls, after: After = None, limit: Limit = 20
) -> EventPage:
    """List what happened to a job and what was measured, newest first."""
    job = queries.row(session, who.tenant, job_id)
    before = job_objects.part_number("ftevent", job_id, after)
    found, more = queries.newest(session, job, before=before, limit=limit)
    data = [job_objects.shown_event(job, item) for item in found]
    return EventPage(data=data, has_more=more, **ends([event.id for event in data]))


@router.get("/{job_id}/checkpoints", responses=openai_answers(404))
def list_fine_tuning_checkpoints(
    job_id: str, session: Reading, who: WhoCalls, after: After = None, limit: Limit = 10
) -> CheckpointPage:
    """List the checkpoints of a job, the highest step first, with what was measured there."""
    job = queries.row(session, who.tenant, job_id)
    below = job_objects.part_number("ftckpt", job_id, after)
    # A step that was repeated after a resume has two; the latest attempt's comes first.
    latest = {row.step: row for row in reversed(queries.checkpoints(session, job_id))}
    steps = sorted((step for step in latest if below is None or step < below), reverse=True)
    measured = queries.measured_at(session, job_id, steps[:limit])
    data = [job_objects.shown_checkpoint(job, latest[step], measured[step]) for step in steps[:limit]]
    return CheckpointPage(data=data, has_more=len(steps) > limit, **ends([item.id for item in data]))


def _wished(wish: Callable[[Session, str, str], None], session: Session, who: Caller, job_id: str) -> FineTuningJob:
    wish(session, who.tenant, job_id)
    return _shown(session, who, job_id)


def _shown(session: Session, who: Caller, job_id: str) -> FineTuningJob:
    return _all_shown(session, [queries.row(session, who.tenant, job_id)])[0]


def _all_shown(session: Session, rows: Sequence[JobRow]) -> list[FineTuningJob]:
    measured = files.with_results(session, [row.id for row in rows])
    now = clock(session)
    return [job_objects.shown(row, has_results=row.id in measured, now=now) for row in rows]
