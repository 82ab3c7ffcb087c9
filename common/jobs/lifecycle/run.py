"""A GPU worker's verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from common.db.engine import clock, db_now
from common.db.rows import ArtifactRow, CheckpointRow, MetricRow
from common.errors import LeaseLost
from common.jobs import doorbell, quotas
from common.jobs.lifecycle.guards import (
    NO_LEASE,
    failed_event,
    guarded,
    hold,
    insert_events,
    interrupted,
    jobs,
    locked,
    outcome,
    owned,
    settle,
    take,
)
from common.jobs.lifecycle.terms import Claim, Event, Failure, Limits, MetricPoint, Published, backoff_s
from common.jobs.line import firsts, lines

SHRINK_MAX = 3


def claim(session: Session, worker_id: str, lease_s: float, held_base: str | None = None) -> Claim | None:
    """Take the first job in line (`common.jobs.line` has the order), or return None.

    Among jobs that have waited less than `PREFER_HELD_BASE_S`, one that wants `held_base` (a base id) comes first.
    """
    full: set[str] = set()
    for line in session.execute(lines(held_base)).all():
        job_id = None if line.tenant in full else _free(session, line, held_base)
        if job_id is None:
            continue
        # Another worker may be about to give this tenant its last place: whoever has the quota's row looks again.
        if line.max_running is None or quotas.has_place(session, line.tenant):
            event = Event("job.claimed", "A worker took the job.", data={"worker": worker_id})
            return take(session, job_id, "queued", _claimed(), worker_id, lease_s, event)
        full.add(line.tenant)
    return None


def _free(session: Session, line: Any, held_base: str | None) -> str | None:
    """Lock the first job of a line that no other transaction holds, and return its id."""
    for best in firsts(line.tenant, line.priority, held_base)[line.warmth :]:
        if (job_id := session.scalar(best.with_for_update(skip_locked=True))) is not None:
            return job_id
    return None


def _claimed() -> dict[str, Any]:
    return {
        "status": "running",
        "stage": "fetch",
        "attempts": jobs.c.attempts + 1,
        "claimed_at": db_now(),
        "started_at": func.coalesce(jobs.c.started_at, db_now()),
    }


def renew(session: Session, claim: Claim) -> str:
    """Extend the lease by its full length from now and return the user's wish: run, pause or cancel.

    Raises:
        LeaseLost: the lease has ended or another attempt owns the job. Kill the trainer and write nothing.
    """
    hold(session, claim.job_id)
    statement = (
        update(jobs)
        .where(*owned(claim, ("running", "validating")))
        .values(lease_expires_at=db_now() + claim.lease_s)
        .returning(jobs.c.desired)
    )
    wish = session.execute(statement).scalar_one_or_none()
    if wish is None:
        raise LeaseLost(f"the lease of attempt {claim.epoch} at {claim.job_id} has ended")
    return str(wish)


def advance(
    session: Session,
    claim: Claim,
    *,
    progress: dict[str, Any] | None = None,
    events: Sequence[Event] = (),
    metrics: Sequence[MetricPoint] = (),
) -> None:
    """Record how far the attempt is: `progress` holds columns of the job (stage, step, max_steps, loss, …)."""
    count = len(events) + len(metrics)
    values = (progress or {}) | {"seq": jobs.c.seq + count, "version": jobs.c.version + 1}
    last = guarded(session, claim, ("running",), values)
    first = last - count + 1
    insert_events(session, claim.job_id, first, events)
    if metrics:
        first += len(events)
        session.execute(
            insert(MetricRow),
            [
                {
                    "job_id": claim.job_id,
                    "seq": first + offset,
                    "at": clock(session),
                    "epoch": claim.epoch,
                    "step": point.step,
                    "kind": point.kind,
                    "values": point.values,
                }
                for offset, point in enumerate(metrics)
            ],
        )


def checkpointed(
    session: Session, claim: Claim, *, step: int, prefix: str, manifest_sha256: str, num_bytes: int
) -> None:
    """Record a checkpoint that lies complete in the store. It clears the counts of crashes and faults.

    Telling it twice changes nothing: the answer to the first commit may have been lost with its connection.
    """
    # One after the other, or two that are told at the same moment would both find nothing there.
    hold(session, claim.job_id)
    same = (CheckpointRow.job_id == claim.job_id, CheckpointRow.epoch == claim.epoch, CheckpointRow.step == step)
    if session.scalar(select(CheckpointRow.step).where(*same)) is not None:
        return
    event = Event("job.checkpointed", f"Checkpoint at step {step}.", data={"step": step, "bytes": num_bytes})
    advance(session, claim, progress={"crashes": 0, "faults": 0}, events=[event])
    session.execute(
        insert(CheckpointRow).values(
            job_id=claim.job_id,
            epoch=claim.epoch,
            step=step,
            prefix=prefix,
            manifest_sha256=manifest_sha256,
            bytes=num_bytes,
            at=db_now(),
        )
    )


def publish(session: Session, claim: Claim, published: Published, report: dict[str, Any]) -> None:
    """The only way to `succeeded`: manifest, artifacts and state in one transaction."""
    values = {
        "status": "succeeded",
        "stage": None,
        "eta_s": None,
        "report": report,
        "finished_at": db_now(),
        "manifest_key": published.manifest_key,
        "manifest_sha256": published.manifest_sha256,
    } | NO_LEASE
    event = Event("job.succeeded", "The result is published.", data={"manifest_sha256": published.manifest_sha256})
    settle(session, claim, "publish", values, event)
    session.execute(insert(ArtifactRow), [{"job_id": claim.job_id, **artifact} for artifact in published.artifacts])


def fail(session: Session, claim: Claim, failure: Failure) -> None:
    """End the job: the reason is the user's to mend, or everything else was tried."""
    values = {"status": "failed", "stage": None, "eta_s": None, "error": failure.shown(), "finished_at": db_now()}
    settle(session, claim, "fail", values | NO_LEASE, failed_event(failure))


def release(session: Session, claim: Claim, event: Event, **values: Any) -> str:
    """Give the job back, to where the user wishes it: queued, paused or cancelled. Returns the new status."""
    status = settle(session, claim, "release", interrupted() | values, outcome(event))
    doorbell.after_commit(session, doorbell.TRAIN)
    return status


def fault(session: Session, claim: Claim, failure: Failure, limits: Limits) -> str:
    """An attempt broke: queue the job again after a pause, or end it where that cannot help. Returns the status.

    A crash counts towards the crash loop, out of memory shrinks the micro-batch by one rung; both end the job at their
    limit. Any other fault only waits, twice as long each time, unless it says how often it may be met.
    """
    row = locked(session, claim, "release")
    if failure.kind == "crash" and row.crashes + 1 >= limits.crash_loop_attempts and row.desired == "run":
        fail(
            session,
            claim,
            Failure(
                "crash",
                "crash_loop",
                f"The trainer died {row.crashes + 1} times without a newer checkpoint. Last: {failure.message}",
                "Look at the events of the job and the worker's log.",
            ),
        )
        return "failed"
    shrunk = failure.kind == "oom" and row.shrink >= SHRINK_MAX
    if (shrunk or failure.ends(row.faults)) and row.desired == "run":
        fail(session, claim, failure)
        return "failed"
    counted: dict[str, Any] = {
        "crash": {"crashes": jobs.c.crashes + 1},
        "oom": {"shrink": jobs.c.shrink + 1},
    }.get(failure.kind, {"faults": jobs.c.faults + 1})
    pause_s = 0.0 if failure.kind == "oom" else backoff_s(row.faults + row.crashes, limits.retry_max_s)
    event = Event(
        "job.interrupted",
        f"{failure.message} The job will be tried again.",
        "warning",
        {"code": failure.code, "kind": failure.kind, "pause_s": pause_s},
    )
    return release(session, claim, event, not_before=db_now() + pause_s, **counted)
