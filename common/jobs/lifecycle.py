"""The only writer of a job's status.

Each verb is one guarded UPDATE, whose WHERE names the legal from-states and, for a worker's verbs, the epoch and a
lease that is alive by the database's clock, plus one event row in the same transaction. Zero rows raises. Nothing here
commits: the caller's `Sessions.write()` does, and rings the bell afterwards.

    the user's verbs:     submit  pause  resume  request_cancel
    a preflight worker's: claim_preflight  accept  reject
    a GPU worker's:       claim  renew  advance  checkpointed  publish  fail  fault  release
    the sweeper's:        expire
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Table, and_, case, func, insert, or_, select, update
from sqlalchemy.orm import Session

from common.db.engine import db_now
from common.db.rows import ArtifactRow, CheckpointRow, EventRow, JobRow, MetricRow
from common.errors import LeaseLost, NotFound, WrongState
from common.ids import new_id
from common.jobs import doorbell, states
from common.schemas.jobs import JobSpec

# A worker prefers a job whose base it holds, but never over one that has waited longer than this.
PREFER_HELD_BASE_S = 60.0
SHRINK_MAX = 3

jobs: Table = JobRow.__table__  # type: ignore[assignment]


@dataclass(frozen=True)
class Claim:
    """Proof that a worker owns a job: every write of a worker carries it. Worthless once the epoch has moved on."""

    job_id: str
    tenant: str
    epoch: int
    worker_id: str
    lease_s: float
    desired: str = "run"


@dataclass(frozen=True)
class Event:
    """An event to append; `level` is info, warning or error."""

    name: str
    message: str
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricPoint:
    """Values logged at a step; `kind` is train or eval."""

    step: int
    values: dict[str, float]
    kind: str = "train"


@dataclass(frozen=True)
class Failure:
    """Why a job failed; `kind` is user_error, infra, oom, diverged, device or crash."""

    kind: str
    code: str
    message: str
    hint: str | None = None
    param: str | None = None

    def shown(self) -> dict[str, Any]:
        """Return what the job's record keeps."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "param": self.param}


@dataclass(frozen=True)
class Limits:
    """How often what may go wrong before a job is given up; seconds for pauses."""

    crash_loop_attempts: int
    retry_max_s: float


@dataclass(frozen=True)
class Published:
    """What an attempt put into the store: the manifest, written last, and every file that it lists."""

    manifest_key: str
    manifest_sha256: str
    artifacts: Sequence[dict[str, Any]]


# ---- the user's verbs ------------------------------------------------------------------------------------------------


def submit(session: Session, tenant: str, spec: JobSpec) -> str:
    """Insert a job in `validating` and return its id."""
    job_id = new_id("job")
    session.execute(
        insert(jobs).values(
            id=job_id,
            tenant=tenant,
            spec=spec.model_dump(mode="json"),
            model=spec.model,
            priority=spec.priority,
            metadata=spec.metadata,
            status="validating",
            created_at=db_now(),
            seq=1,
            version=1,
        )
    )
    _insert_events(session, job_id, 1, [Event("job.submitted", "The job was accepted and will be checked.")])
    doorbell.after_commit(session, doorbell.PREFLIGHT)
    return job_id


def request_cancel(session: Session, tenant: str, job_id: str) -> None:
    """Cancel a job that waits, at once; tell the worker of one that runs. A cancelled job stays cancelled.

    Raises:
        WrongState: the job has already succeeded or failed.
        NotFound: no such job in this tenant.
    """
    own = _own(tenant, job_id)
    ended = {"status": "cancelled", "desired": "cancel", "finished_at": db_now()} | _NO_LEASE
    if _change(
        session,
        [own, jobs.c.status.in_(states.sources("cancel"))],
        ended,
        Event("job.cancelled", "Cancelled before it ran."),
    ):
        return
    wish = [own, jobs.c.status == "running", jobs.c.desired != "cancel"]
    if _change(session, wish, {"desired": "cancel"}, Event("job.cancel_requested", "The worker was told to stop.")):
        return
    _refuse_unless(session, own, ("cancelled", "running"), "cancel")


def pause(session: Session, tenant: str, job_id: str) -> None:
    """Put a queued job aside at once; a validating or running one as soon as it can be.

    Raises:
        WrongState: the job has ended or is being cancelled.
        NotFound: no such job in this tenant.
    """
    own = _own(tenant, job_id)
    if _change(
        session,
        [own, jobs.c.status.in_(states.sources("pause"))],
        {"status": "paused", "desired": "pause"},
        Event("job.paused", "Paused before it ran."),
    ):
        return
    wish = [own, jobs.c.status.in_(("validating", "running")), jobs.c.desired == "run"]
    if _change(
        session,
        wish,
        {"desired": "pause"},
        Event("job.pause_requested", "The job will pause after its next checkpoint."),
    ):
        return
    wished = session.scalar(select(jobs.c.desired).where(own))
    allowed = ("paused", "validating", "running") if wished == "pause" else ("paused",)
    _refuse_unless(session, own, allowed, "pause")


def resume(session: Session, tenant: str, job_id: str) -> None:
    """Queue a paused job again, or withdraw a pause that has not happened yet.

    Raises:
        WrongState: the job is not paused and no pause was asked for.
        NotFound: no such job in this tenant.
    """
    own = _own(tenant, job_id)
    back = {"status": "queued", "desired": "run", "not_before": 0.0, "queued_at": db_now()}
    if _change(
        session,
        [own, jobs.c.status.in_(states.sources("resume"))],
        back,
        Event("job.resumed", "Queued again; it goes on from its last checkpoint."),
    ):
        doorbell.after_commit(session, doorbell.TRAIN)
        return
    withdrawn = [own, jobs.c.status.in_(("validating", "running")), jobs.c.desired == "pause"]
    if not _change(session, withdrawn, {"desired": "run"}, Event("job.pause_withdrawn", "The job goes on.")):
        _refuse_unless(session, own, (), "resume")


# ---- a preflight worker's verbs --------------------------------------------------------------------------------------


def claim_preflight(session: Session, worker_id: str, lease_s: float) -> Claim | None:
    """Take the oldest job that waits for its check, or return None. The state stays `validating`."""
    free = or_(jobs.c.lease_expires_at.is_(None), jobs.c.lease_expires_at < db_now())
    best = (
        select(jobs.c.id)
        .where(jobs.c.status == "validating", free, jobs.c.not_before <= db_now())
        .order_by(jobs.c.priority.desc(), jobs.c.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return _take(
        session,
        best,
        "validating",
        {"stage": "preflight"},
        worker_id,
        lease_s,
        Event("job.checking", "Checking the dataset and the base model."),
    )


def accept(
    session: Session,
    claim: Claim,
    *,
    base_id: str,
    base_revision: str | None,
    dataset_sha256: str,
    report: dict[str, Any],
) -> None:
    """The check passed: pin the base and the data, and queue the job (or park it, if that is wished)."""
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
    } | _NO_LEASE
    _settle(
        session,
        claim,
        "accept",
        values,
        Event("job.accepted", "The check passed; waiting for a GPU worker.", data=report),
    )
    doorbell.after_commit(session, doorbell.TRAIN)


def reject(session: Session, claim: Claim, failure: Failure, report: dict[str, Any] | None = None) -> None:
    """The check failed: the job ends here, with the reason."""
    values = {
        "status": "failed",
        "stage": None,
        "error": failure.shown(),
        "preflight": report,
        "finished_at": db_now(),
    } | _NO_LEASE
    _settle(session, claim, "reject", values, _failed_event(failure))


def postpone(session: Session, claim: Claim, failure: Failure, limits: Limits) -> None:
    """The check could not be made (hub, store or network away): try again after a pause; the state stays."""
    row = _locked(session, claim, "accept")
    if failure.kind == "crash" and row.crashes + 1 >= limits.crash_loop_attempts:
        reject(session, claim, failure)
        return
    counted = {"crashes": jobs.c.crashes + 1} if failure.kind == "crash" else {"faults": jobs.c.faults + 1}
    pause_s = backoff_s(row.faults + row.crashes, limits.retry_max_s)
    values = {"stage": None, "not_before": db_now() + pause_s} | counted | _NO_LEASE
    event = Event(
        "job.postponed", f"{failure.message} Trying again in {pause_s:.0f} s.", "warning", {"code": failure.code}
    )
    _settle(session, claim, "accept", values, event)


# ---- a GPU worker's verbs --------------------------------------------------------------------------------------------


def claim(session: Session, worker_id: str, lease_s: float, held_base: str | None = None) -> Claim | None:
    """Take the best eligible job, or return None.

    Order: priority, then the tenant with the fewest running jobs, then age; among jobs that have waited less than
    `PREFER_HELD_BASE_S`, one that wants `held_base` (a base id) comes first.
    """
    running = (
        select(jobs.c.tenant, func.count().label("num_running"))
        .where(jobs.c.status == "running")
        .group_by(jobs.c.tenant)
        .subquery()
    )
    long_waited = jobs.c.queued_at < db_now() - PREFER_HELD_BASE_S
    warmth = case((long_waited, 0), (jobs.c.base_id == (held_base or ""), 1), else_=2)
    best = (
        select(jobs.c.id)
        .outerjoin(running, running.c.tenant == jobs.c.tenant)
        .where(jobs.c.status == "queued", jobs.c.not_before <= db_now())
        .order_by(jobs.c.priority.desc(), func.coalesce(running.c.num_running, 0), warmth, jobs.c.created_at, jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=jobs)
    )
    values = {
        "status": "running",
        "stage": "fetch",
        "attempts": jobs.c.attempts + 1,
        "started_at": func.coalesce(jobs.c.started_at, db_now()),
    }
    return _take(
        session,
        best,
        "queued",
        values,
        worker_id,
        lease_s,
        Event("job.claimed", "A worker took the job.", data={"worker": worker_id}),
    )


def renew(session: Session, claim: Claim) -> str:
    """Extend the lease by its full length from now and return the user's wish: run, pause or cancel.

    Raises:
        LeaseLost: the lease has ended or another attempt owns the job. Kill the trainer and write nothing.
    """
    statement = (
        update(jobs)
        .where(*_owned(claim, ("running", "validating")))
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
    last = _guarded(session, claim, ("running",), values)
    first = last - count + 1
    _insert_events(session, claim.job_id, first, events)
    if metrics:
        first += len(events)
        session.execute(
            insert(MetricRow),
            [
                {
                    "job_id": claim.job_id,
                    "seq": first + offset,
                    "at": _clock(session),
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
    """Record a checkpoint that lies complete in the store. It clears the counts of crashes and faults."""
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
    } | _NO_LEASE
    event = Event("job.succeeded", "The adapter is published.", data={"manifest_sha256": published.manifest_sha256})
    _settle(session, claim, "publish", values, event)
    session.execute(insert(ArtifactRow), [{"job_id": claim.job_id, **artifact} for artifact in published.artifacts])


def fail(session: Session, claim: Claim, failure: Failure) -> None:
    """End the job: the reason is the user's to mend, or everything else was tried."""
    values = {"status": "failed", "stage": None, "eta_s": None, "error": failure.shown(), "finished_at": db_now()}
    _settle(session, claim, "fail", values | _NO_LEASE, _failed_event(failure))


def release(session: Session, claim: Claim, event: Event, **values: Any) -> str:
    """Give the job back, to where the user wishes it: queued, paused or cancelled. Returns the new status."""
    target = _wished()
    settled = {
        "status": target,
        "stage": None,
        "eta_s": None,
        "tokens_per_s": None,
        "finished_at": case((jobs.c.desired == "cancel", db_now()), else_=None),
    }
    status = _settle(session, claim, "release", settled | _NO_LEASE | values, _outcome(event))
    doorbell.after_commit(session, doorbell.TRAIN)
    return status


def fault(session: Session, claim: Claim, failure: Failure, limits: Limits) -> str:
    """An attempt broke: queue the job again after a pause, or end it where that cannot help. Returns the status.

    A crash counts towards the crash loop, out of memory shrinks the micro-batch by one rung; both end the job at their
    limit. An infrastructure fault only waits, twice as long each time.
    """
    row = _locked(session, claim, "release")
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
    if failure.kind == "oom" and row.shrink >= SHRINK_MAX and row.desired == "run":
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


def backoff_s(num_faults: int, most_s: float) -> float:
    """Return the pause before the next try in seconds: 1, 2, 4, … up to `most_s`."""
    return min(float(2 ** min(num_faults, 20)), most_s)


# ---- the sweeper's verbs ---------------------------------------------------------------------------------------------


def expire(session: Session, job_id: str) -> str | None:
    """Take a job from a worker whose lease has ended; return its new status, or None if the lease lives after all."""
    late = [jobs.c.id == job_id, jobs.c.lease_expires_at < db_now()]
    event = Event("job.lease_expired", "The worker was lost; the job goes on from its last checkpoint.", "warning")
    values = {
        "status": _wished(),
        "stage": None,
        "eta_s": None,
        "tokens_per_s": None,
        "finished_at": case((jobs.c.desired == "cancel", db_now()), else_=None),
    } | _NO_LEASE
    status = _change(session, [*late, jobs.c.status.in_(states.sources("expire"))], values, _outcome(event))
    if status == "queued":
        doorbell.after_commit(session, doorbell.TRAIN)
    if status is None and _change(session, [*late, jobs.c.status == "validating"], {"stage": None} | _NO_LEASE, event):
        doorbell.after_commit(session, doorbell.PREFLIGHT)
        return "validating"
    return status


# ---- how a verb is written -------------------------------------------------------------------------------------------

EventOf = Callable[[str], Event]
_NO_LEASE: dict[str, Any] = {"worker_id": None, "lease_expires_at": None}


def _wished() -> ColumnElement[str]:
    return case(states.SETTLED, value=jobs.c.desired)


def _own(tenant: str, job_id: str) -> ColumnElement[bool]:
    return and_(jobs.c.tenant == tenant, jobs.c.id == job_id)


def _owned(claim: Claim, statuses: Sequence[str]) -> list[ColumnElement[bool]]:
    return [
        jobs.c.id == claim.job_id,
        jobs.c.status.in_(statuses),
        jobs.c.epoch == claim.epoch,
        jobs.c.worker_id == claim.worker_id,
        jobs.c.lease_expires_at > db_now(),
    ]


def _outcome(queued: Event) -> EventOf:
    """Return the event for where an interrupted run went: `queued`, or what the user had wished for."""
    wished = {
        "paused": Event("job.paused", "Paused; it can go on from its last checkpoint."),
        "cancelled": Event("job.cancelled", "Cancelled while it ran."),
    }
    return lambda status: wished.get(status, queued)


def _change(
    session: Session, where: Sequence[ColumnElement[bool]], values: dict[str, Any], event: Event | EventOf
) -> str | None:
    """Run one guarded UPDATE with its event; return the new status, or None where the guard held nothing."""
    numbered = values | {"seq": jobs.c.seq + 1, "version": jobs.c.version + 1}
    statement = update(jobs).where(*where).values(numbered).returning(jobs.c.id, jobs.c.status, jobs.c.seq)
    row = session.execute(statement).one_or_none()
    if row is None:
        return None
    _insert_events(session, row.id, row.seq, [event if isinstance(event, Event) else event(row.status)])
    return str(row.status)


def _settle(session: Session, claim: Claim, verb: states.Verb, values: dict[str, Any], event: Event | EventOf) -> str:
    status = _change(session, _owned(claim, states.sources(verb)), values, event)
    if status is None:
        raise LeaseLost(f"attempt {claim.epoch} no longer owns {claim.job_id}: {verb} was refused")
    return status


def _guarded(session: Session, claim: Claim, statuses: Sequence[str], values: dict[str, Any]) -> int:
    statement = update(jobs).where(*_owned(claim, statuses)).values(values).returning(jobs.c.seq)
    seq = session.execute(statement).scalar_one_or_none()
    if seq is None:
        raise LeaseLost(f"attempt {claim.epoch} no longer owns {claim.job_id}: a report was refused")
    return int(seq)


def _locked(session: Session, claim: Claim, verb: states.Verb) -> Any:
    columns = (jobs.c.crashes, jobs.c.faults, jobs.c.shrink, jobs.c.desired)
    row = session.execute(select(*columns).where(*_owned(claim, states.sources(verb))).with_for_update()).one_or_none()
    if row is None:
        raise LeaseLost(f"attempt {claim.epoch} no longer owns {claim.job_id}")
    return row


def _take(
    session: Session, best: Any, status: str, values: dict[str, Any], worker_id: str, lease_s: float, event: Event
) -> Claim | None:
    leased = values | {
        "epoch": jobs.c.epoch + 1,
        "worker_id": worker_id,
        "lease_expires_at": db_now() + lease_s,
        "seq": jobs.c.seq + 1,
        "version": jobs.c.version + 1,
    }
    statement = (
        update(jobs)
        .where(jobs.c.id == best.scalar_subquery(), jobs.c.status == status)
        .values(leased)
        .returning(jobs.c.id, jobs.c.tenant, jobs.c.epoch, jobs.c.seq, jobs.c.desired)
    )
    row = session.execute(statement).one_or_none()
    if row is None:
        return None
    _insert_events(session, row.id, row.seq, [event])
    return Claim(row.id, row.tenant, row.epoch, worker_id, lease_s, row.desired)


def _insert_events(session: Session, job_id: str, first_seq: int, events: Sequence[Event]) -> None:
    if events:
        at = _clock(session)
        session.execute(
            insert(EventRow),
            [
                {
                    "job_id": job_id,
                    "seq": first_seq + offset,
                    "at": at,
                    "name": event.name,
                    "level": event.level,
                    "message": event.message,
                    "data": event.data,
                }
                for offset, event in enumerate(events)
            ],
        )


def _clock(session: Session) -> float:
    # A SQL expression cannot stand in the rows of an insert of many.
    return float(session.scalar(select(db_now())) or 0.0)


def _failed_event(failure: Failure) -> Event:
    return Event("job.failed", failure.message, "error", failure.shown())


def _refuse_unless(session: Session, own: ColumnElement[bool], allowed: Sequence[str], verb: str) -> None:
    """Raise unless the job is already where the verb would lead."""
    status = session.scalar(select(jobs.c.status).where(own))
    if status is None:
        raise NotFound("there is no such job", param="id", hint="GET /jobs lists the jobs of your key's tenant.")
    if status not in allowed:
        raise WrongState(f"a job that is {status} cannot {verb}", code=f"cannot_{verb}")
