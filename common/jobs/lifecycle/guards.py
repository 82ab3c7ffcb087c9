"""How a verb is written: one guarded UPDATE, one event row, what webhooks are to be told of it, no commit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Table, and_, case, insert, select, update
from sqlalchemy.orm import Session

from common.db.engine import clock, db_now
from common.db.rows import EventRow, JobRow, LabelRow, UsageRow
from common.errors import LeaseLost, WrongState, no_job
from common.ids import new_id
from common.jobs import states
from common.jobs.lifecycle.terms import Claim, Event, Failure
from common.schemas.jobs import JobSpec
from common.webhooks import outbox

jobs: Table = JobRow.__table__  # type: ignore[assignment]
EventOf = Callable[[str], Event]
# A user's verbs as what is done to a job.
_DONE = {
    "cancel": "cancelled",
    "pause": "paused",
    "reorder": "reordered",
    "resume": "resumed",
    "retry": "retried",
}
# The verbs by which a running job leaves its worker.
_LEAVING = ("publish", "fail", "release")
NO_LEASE: dict[str, Any] = {"worker_id": None, "lease_expires_at": None}


def interrupted() -> dict[str, Any]:
    """Return the columns of a job that leaves its worker unfinished: its new status is what the user wishes."""
    return {
        "status": case(states.SETTLED, value=jobs.c.desired),
        "stage": None,
        "eta_s": None,
        "tokens_per_s": None,
        "finished_at": case((jobs.c.desired == "cancel", db_now()), else_=None),
    } | NO_LEASE


def own_job(tenant: str, job_id: str) -> ColumnElement[bool]:
    """Return the condition that a job is this tenant's."""
    return and_(jobs.c.tenant == tenant, jobs.c.id == job_id)


def held(session: Session, tenant: str, job_id: str) -> ColumnElement[bool]:
    """Return the condition that names the job, and hold its row until the end of the transaction.

    A wish looks twice, for a job that waits and for one that runs: in between no worker may take or give it back.
    """
    own = own_job(tenant, job_id)
    session.execute(select(jobs.c.id).where(own).with_for_update())
    return own


def add(
    session: Session,
    tenant: str,
    spec: JobSpec,
    status: str,
    event: Event,
    *,
    stored: dict[str, Any] | None,
    **columns: Any,
) -> str:
    """Insert a job with its first event and return its id.

    Args:
        stored: how an older row has `spec`, where that is to be kept to the letter.
        columns: what is known of it already.
    """
    job_id = new_id("job")
    asked = {
        "spec": spec.model_dump(mode="json") if stored is None else stored,
        "model": spec.model,
        "priority": spec.priority,
        "hold_until": spec.not_before.timestamp() if spec.not_before else 0.0,
        "metadata": spec.metadata,
    }
    session.execute(
        insert(jobs).values(
            id=job_id, tenant=tenant, status=status, created_at=db_now(), seq=1, version=1, **asked, **columns
        )
    )
    if spec.metadata:
        labels = [
            {"tenant": tenant, "key": key, "value": value, "job_id": job_id} for key, value in spec.metadata.items()
        ]
        session.execute(insert(LabelRow).values(labels))
    insert_events(session, job_id, 1, [event])
    outbox.record(session, {job_id: (1, event.message)})
    return job_id


def owned(claim: Claim, statuses: Sequence[str]) -> list[ColumnElement[bool]]:
    """Return when a worker may write: its epoch is the row's, and its lease is alive by the database's clock."""
    return [
        jobs.c.id == claim.job_id,
        jobs.c.status.in_(statuses),
        jobs.c.epoch == claim.epoch,
        jobs.c.worker_id == claim.worker_id,
        jobs.c.lease_expires_at > db_now(),
    ]


def hold(session: Session, job_id: str) -> None:
    """Lock the job's row until the transaction ends; to be called before the lease is judged.

    An UPDATE alone is not enough. Postgres judges its WHERE before it waits for the row, and again only if the
    transaction that it waited for has changed the row; the lease may have ended meanwhile.
    """
    session.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())


def outcome(queued: Event) -> EventOf:
    """Return the event for where an interrupted run went: `queued`, or what the user had wished for."""
    meant = {
        "paused": Event("job.paused", "Paused; it can go on from its last checkpoint."),
        "cancelled": Event("job.cancelled", "Cancelled while it ran."),
    }
    return lambda status: meant.get(status, queued)


def change(
    session: Session, where: Sequence[ColumnElement[bool]], values: dict[str, Any], event: Event | EventOf
) -> str | None:
    """Run one guarded UPDATE with its event; return the new status, or None where the guard held nothing."""
    changed = change_each(session, where, values, event)
    return next(iter(changed.values()), None)


def change_each(
    session: Session, where: Sequence[ColumnElement[bool]], values: dict[str, Any], event: Event | EventOf
) -> dict[str, str]:
    """Run one guarded UPDATE with an event for each job that it changes; return their new states by id."""
    numbered = values | {"seq": jobs.c.seq + 1, "version": jobs.c.version + 1}
    statement = update(jobs).where(*where).values(numbered).returning(jobs.c.id, jobs.c.status, jobs.c.seq)
    rows = session.execute(statement).all()
    if not rows:
        return {}
    told = [(row.id, row.seq, event if isinstance(event, Event) else event(row.status)) for row in rows]
    _insert_events(session, told)
    if "status" in values:
        outbox.record(session, {job_id: (seq, said.message) for job_id, seq, said in told})
    return {row.id: str(row.status) for row in rows}


def settle(session: Session, claim: Claim, verb: states.Verb, values: dict[str, Any], event: Event | EventOf) -> str:
    """Run one guarded UPDATE of a worker and return the new status; raises LeaseLost where the guard held nothing."""
    hold(session, claim.job_id)
    status = change(session, owned(claim, states.sources(verb)), values, event)
    if status is None:
        raise LeaseLost(f"attempt {claim.epoch} no longer owns {claim.job_id}: {verb} was refused")
    if verb in _LEAVING:
        book_usage(session, [claim.job_id])
    return status


def book_usage(session: Session, job_ids: Collection[str]) -> None:
    """Note the time for which the attempts at these jobs, which have just ended, held their workers."""
    held = select(jobs.c.id, jobs.c.epoch, jobs.c.tenant, jobs.c.claimed_at, db_now()).where(
        jobs.c.id.in_(job_ids), jobs.c.claimed_at.is_not(None)
    )
    session.execute(insert(UsageRow).from_select(["job_id", "epoch", "tenant", "started_at", "ended_at"], held))


def guarded(session: Session, claim: Claim, statuses: Sequence[str], values: dict[str, Any]) -> int:
    """Run one guarded UPDATE that changes no state; return the sequence number after it. Raises LeaseLost."""
    hold(session, claim.job_id)
    statement = update(jobs).where(*owned(claim, statuses)).values(values).returning(jobs.c.seq)
    seq = session.execute(statement).scalar_one_or_none()
    if seq is None:
        raise LeaseLost(f"attempt {claim.epoch} no longer owns {claim.job_id}: a report was refused")
    return int(seq)


def locked(session: Session, claim: Claim, verb: states.Verb) -> Any:
    """Lock the row that a worker owns and return its counts and the user's wish; may raise LeaseLost."""
    hold(session, claim.job_id)
    columns = (jobs.c.crashes, jobs.c.faults, jobs.c.shrink, jobs.c.desired)
    row = session.execute(select(*columns).where(*owned(claim, states.sources(verb))).with_for_update()).one_or_none()
    if row is None:
        raise LeaseLost(f"attempt {claim.epoch} no longer owns {claim.job_id}")
    return row


def take(
    session: Session, job_id: str, status: str, values: dict[str, Any], worker_id: str, lease_s: float, event: Event
) -> Claim | None:
    """Claim a job, with a new epoch and lease; None where it is not in `status` any more."""
    leased = values | {
        "epoch": jobs.c.epoch + 1,
        "worker_id": worker_id,
        "lease_expires_at": db_now() + lease_s,
        "seq": jobs.c.seq + 1,
        "version": jobs.c.version + 1,
    }
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status == status)
        .values(leased)
        .returning(jobs.c.id, jobs.c.tenant, jobs.c.epoch, jobs.c.seq, jobs.c.desired)
    )
    row = session.execute(statement).one_or_none()
    if row is None:
        return None
    insert_events(session, row.id, row.seq, [event])
    if "status" in values:
        outbox.record(session, {row.id: (row.seq, event.message)})
    return Claim(row.id, row.tenant, row.epoch, worker_id, lease_s, row.desired)


def insert_events(session: Session, job_id: str, first_seq: int, events: Sequence[Event]) -> None:
    """Append events to a job's history, numbered from `first_seq`."""
    if events:
        _insert_events(session, [(job_id, first_seq + offset, event) for offset, event in enumerate(events)])


def _insert_events(session: Session, numbered: Sequence[tuple[str, int, Event]]) -> None:
    at = clock(session)
    session.execute(
        insert(EventRow),
        [
            {
                "job_id": job_id,
                "seq": seq,
                "at": at,
                "name": event.name,
                "level": event.level,
                "message": event.message,
                "data": event.data,
            }
            for job_id, seq, event in numbered
        ],
    )


def failed_event(failure: Failure) -> Event:
    """Return the event of a job that ended in `failure`."""
    return Event("job.failed", failure.message, "error", failure.told())


def refuse_unless(session: Session, own: ColumnElement[bool], allowed: Sequence[str], verb: str) -> None:
    """Raise WrongState unless the job's status is one of `allowed`, in which `verb` has nothing left to do."""
    status = session.scalar(select(jobs.c.status).where(own))
    if status is None:
        raise no_job()
    if status not in allowed:
        ended = {"succeeded": "has succeeded", "failed": "has failed"}
        raise WrongState(
            f"a job that {ended.get(status, f'is {status}')} cannot be {_DONE[verb]}", code=f"cannot_{verb}"
        )
