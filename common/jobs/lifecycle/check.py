"""A preflight worker's verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import case, or_, select
from sqlalchemy.orm import Session

from common.db.engine import db_now
from common.jobs import doorbell
from common.jobs.lifecycle.guards import (
    NO_LEASE,
    failed_event,
    guarded,
    insert_events,
    jobs,
    locked,
    settle,
    take,
)
from common.jobs.lifecycle.terms import Claim, Event, Failure, Limits, backoff_s
from common.jobs.line import NOTHING, turn, waits


def claim_preflight(
    session: Session, worker_id: str, lease_s: float, spent: Mapping[str, int] = NOTHING
) -> Claim | None:
    """Take the next job that waits for its check, or return None. The state stays `validating`.

    Priority comes first, then the tenant with the least of the worker's seconds in `spent`, then age.
    """
    free = or_(jobs.c.lease_expires_at.is_(None), jobs.c.lease_expires_at < db_now())
    best = (
        select(jobs.c.id)
        .where(waits("validating"), free, jobs.c.not_before <= db_now())
        .order_by(jobs.c.priority.desc(), turn(jobs.c.tenant, spent), jobs.c.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    job_id = session.scalar(best)
    if job_id is None:
        return None
    event = Event("job.checking", "Checking the dataset and the base model.")
    begun = {"stage": "preflight", "checked": None}
    return take(session, job_id, "validating", begun, worker_id, lease_s, event)


def checking(session: Session, claim: Claim, checked: dict[str, Any]) -> None:
    """Record how far the check is, as the fields of `CheckProgress`. Raises LeaseLost."""
    guarded(session, claim, ("validating",), {"checked": checked, "version": jobs.c.version + 1})


def accept(
    session: Session,
    claim: Claim,
    *,
    base_id: str,
    base_revision: str | None,
    dataset_sha256: str,
    report: dict[str, Any],
    warnings: Sequence[Event] = (),
) -> None:
    """The check passed: pin the base and the data, and queue the job (or park it, if that is wished).

    `warnings` are events that come before its acceptance.
    """
    if warnings:
        count = {"seq": jobs.c.seq + len(warnings), "version": jobs.c.version + 1}
        last = guarded(session, claim, ("validating",), count)
        insert_events(session, claim.job_id, last - len(warnings) + 1, warnings)
    target = case((jobs.c.desired == "pause", "paused"), else_="queued")
    values = {
        "status": target,
        "stage": None,
        "queued_at": db_now(),
        "base_id": base_id,
        "faults": 0,
        "crashes": 0,
        "base_revision": base_revision,
        "dataset_sha256": dataset_sha256,
        "preflight": report,
    } | NO_LEASE
    settle(
        session,
        claim,
        "accept",
        values,
        Event("job.accepted", "The check passed; waiting for a GPU worker.", data=report),
    )
    doorbell.after_commit(session, doorbell.TRAIN)


def reject(session: Session, claim: Claim, failure: Failure) -> None:
    """The check failed: the job ends here, with the reason."""
    values = {
        "status": "failed",
        "stage": None,
        "error": failure.shown(),
        "finished_at": db_now(),
    } | NO_LEASE
    settle(session, claim, "reject", values, failed_event(failure))


def postpone(session: Session, claim: Claim, failure: Failure, limits: Limits) -> None:
    """The check could not be made (hub, store or network away): try again after a pause; the state stays.

    It ends the job where it crashed too often, or where the failure says that waiting has no end.
    """
    row = locked(session, claim, "accept")
    looping = failure.kind == "crash" and row.crashes + 1 >= limits.crash_loop_attempts
    if looping or failure.ends(row.faults):
        reject(session, claim, failure)
        return
    counted = {"crashes": jobs.c.crashes + 1} if failure.kind == "crash" else {"faults": jobs.c.faults + 1}
    pause_s = backoff_s(row.faults + row.crashes, limits.retry_max_s)
    values = {"stage": None, "not_before": db_now() + pause_s} | counted | NO_LEASE
    event = Event(
        "job.postponed", f"{failure.message} Trying again in {pause_s:.0f} s.", "warning", {"code": failure.code}
    )
    settle(session, claim, "accept", values, event)
