"""What is to be told: one row for each event and webhook, written in the event's own transaction.

So an event that happened is told, whatever dies afterwards, and one that was rolled back is not. Telling is at least
once: a delivery is leased to one deliverer at a time, and one whose deliverer died is sent again with the same id.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Table, func, insert, or_, select, update
from sqlalchemy.orm import Session

from common.clock import moment
from common.db.engine import clock, db_now
from common.db.forgetting import removal
from common.db.rows import DeliveryRow, JobRow, WebhookRow
from common.ids import new_id
from common.schemas.webhooks import PING
from common.webhooks import registry

# Pauses in seconds before the 2nd, 3rd, … attempt, those that the specification recommends: three days in all.
SCHEDULE_S = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
_JITTER = 0.1
# Longer than an attempt can take.
LEASE_S = 60.0
KEPT_S = 30 * 86_400.0
# Of the deliveries that are due, so many of each webhook at once: one that is slow must not take all the places.
PER_WEBHOOK = 4

_jobs: Table = JobRow.__table__  # type: ignore[assignment]
_hooks: Table = WebhookRow.__table__  # type: ignore[assignment]
_outbox: Table = DeliveryRow.__table__  # type: ignore[assignment]


@dataclass(frozen=True)
class Due:
    """A delivery that this process is to make now, and the proof that it may: `attempt`. Shows no secret."""

    id: str
    webhook_id: str
    url: str = field(repr=False)
    body: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    attempt: int = 1


@dataclass(frozen=True)
class _Message:
    """What is to be told to one webhook."""

    webhook_id: str
    type: str
    facts: dict[str, Any]
    job_id: str | None
    id: str = field(default_factory=lambda: new_id("msg"))

    def body(self, at: float) -> str:
        told = {"type": self.type, "timestamp": moment(at).isoformat().replace("+00:00", "Z"), "data": self.facts}
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Result:
    """How an attempt went: the status that was answered, or why there was none."""

    answer: int | None = None
    error: str | None = None
    retry_after_s: float = 0.0

    @property
    def success(self) -> bool:
        """Whether the receiver took it."""
        return self.answer is not None and 200 <= self.answer < 300


def record(session: Session, entered: Mapping[str, tuple[int, str]]) -> None:
    """Write down for each webhook of a job's tenant that the job has come into its present status.

    Args:
        entered: by the id of the job, the cursor and the message of the event by which it came there.
    """
    wanted = (
        select(_hooks.c.id, _hooks.c.events, _jobs.c.id.label("job_id"))
        .join(_jobs, _jobs.c.tenant == _hooks.c.tenant)
        .where(_jobs.c.id.in_(entered), _hooks.c.disabled_at.is_(None))
    )
    # Held until the commit: a webhook that is being removed must not take the job's transaction down with it.
    hooks = session.execute(wanted.with_for_update(read=True, key_share=True, of=_hooks)).all()
    if not hooks:
        return
    found = {job.id: job for job in session.execute(select(_jobs).where(_jobs.c.id.in_({row.job_id for row in hooks})))}
    messages = []
    for hook in hooks:
        job = found[hook.job_id]
        told = f"job.{job.status}"
        if hook.events is None or told in hook.events:
            messages.append(_Message(hook.id, told, _facts(job, *entered[job.id]), job.id))
    _insert(session, messages)


def _facts(job: Any, cursor: int, message: str) -> dict[str, Any]:
    spec = job.spec
    names = ("id", "status", "model", "step", "max_steps", "metadata", "source_job")
    # What is wrong with each row is read from the job.
    error = {name: value for name, value in job.error.items() if name != "problems"} if job.error else None
    return {name: getattr(job, name) for name in names} | {
        "error": error,
        "suffix": spec.get("suffix"),
        "attempt": job.attempts,
        "message": message,
        "cursor": cursor,
    }


def ping(session: Session, webhook_id: str) -> str:
    """Write down a message that says nothing but that the webhook works; return its id."""
    facts = {"webhook": webhook_id, "message": "This webhook works."}
    message = _Message(webhook_id, PING, facts, None)
    _insert(session, [message])
    return message.id


def _insert(session: Session, messages: Sequence[_Message]) -> None:
    if not messages:
        return
    now = clock(session)
    common = {"state": "pending", "attempts": 0, "failures": 0, "next_at": now, "created_at": now}
    rows = [
        common | {
            "id": message.id, "webhook_id": message.webhook_id, "type": message.type, "job_id": message.job_id,
            "body": message.body(now),
        }
        for message in messages
    ]  # fmt: skip
    session.execute(insert(_outbox), rows)


def claim(session: Session, most: int, busy: Collection[str]) -> list[Due]:
    """Lease up to `most` deliveries that are due, none of them for the webhooks in `busy`.

    Each webhook's first ones come before any webhook's later ones.
    """
    due = _due() & _outbox.c.webhook_id.not_in(busy)
    place = func.row_number().over(partition_by=_outbox.c.webhook_id, order_by=(_outbox.c.next_at, _outbox.c.id))
    ranked = (
        select(_outbox.c.id, _outbox.c.next_at, place.label("place"))
        .join(_hooks, _hooks.c.id == _outbox.c.webhook_id)
        .where(due, _hooks.c.disabled_at.is_(None))
        .subquery()
    )
    first = (
        select(ranked.c.id).where(ranked.c.place <= PER_WEBHOOK).order_by(ranked.c.place, ranked.c.next_at).limit(most)
    )
    # Locked and looked at again: what another deliverer has taken in between is passed over.
    free = select(_outbox.c.id).where(_outbox.c.id.in_(first), _due()).with_for_update(skip_locked=True)
    taken = list(session.scalars(free))
    if not taken:
        return []
    leased = {"lease_expires_at": db_now() + LEASE_S, "attempts": _outbox.c.attempts + 1}
    session.execute(update(_outbox).where(_outbox.c.id.in_(taken)).values(leased))
    rows = session.execute(
        select(_outbox, _hooks.c.url, _hooks.c.secret, _hooks.c.old_secret, _hooks.c.old_secret_until, db_now())
        .join(_hooks, _hooks.c.id == _outbox.c.webhook_id)
        .where(_outbox.c.id.in_(taken))
        .order_by(_outbox.c.next_at, _outbox.c.id)
    )
    return [Due(row.id, row.webhook_id, row.url, row.body, _secrets(row), row.attempts) for row in rows]


def _due() -> ColumnElement[bool]:
    unleased = or_(_outbox.c.lease_expires_at.is_(None), _outbox.c.lease_expires_at < db_now())
    return (_outbox.c.state == "pending") & (_outbox.c.next_at <= db_now()) & unleased


def _secrets(row: Any) -> tuple[str, ...]:
    old_counts = row.old_secret is not None and row.old_secret_until > row[-1]
    return (row.secret, row.old_secret) if old_counts else (row.secret,)


def settle(session: Session, due: Due, result: Result) -> str | None:
    """Note how an attempt went and return the delivery's state; None where another attempt has begun since."""
    mine = (_outbox.c.id == due.id) & (_outbox.c.attempts == due.attempt) & (_outbox.c.state == "pending")
    row = session.execute(select(_outbox.c.failures, _outbox.c.created_at).where(mine).with_for_update()).one_or_none()
    if row is None:
        return None
    values: dict[str, Any] = {"answer": result.answer, "error": result.error, "lease_expires_at": None}
    if result.success:
        values |= {"state": "delivered", "ended_at": db_now(), "error": None}
        session.execute(update(_hooks).where(_hooks.c.id == due.webhook_id).values(last_success_at=db_now()))
    elif result.answer == 410 or row.failures >= len(SCHEDULE_S):
        values |= {"state": "failed", "ended_at": db_now()}
    else:
        pause_s = SCHEDULE_S[row.failures] * random.uniform(1 - _JITTER, 1 + _JITTER)
        values |= {"failures": row.failures + 1, "next_at": db_now() + max(pause_s, result.retry_after_s)}
    session.execute(update(_outbox).where(mine).values(values))
    if result.answer == 410:
        registry.disable(session, due.webhook_id, registry.GONE)
    elif values.get("state") == "failed" and not _taken_since(session, due.webhook_id, row.created_at):
        registry.disable(session, due.webhook_id, registry.FAILING)
    return values.get("state", "pending")


def _taken_since(session: Session, webhook_id: str, since: float) -> bool:
    last = session.scalar(select(_hooks.c.last_success_at).where(_hooks.c.id == webhook_id))
    return last is not None and last >= since


def forget(session: Session) -> None:
    """Remove deliveries that ended long ago."""
    session.execute(removal(DeliveryRow.ended_at, KEPT_S))
