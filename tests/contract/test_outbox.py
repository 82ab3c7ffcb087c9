"""What webhooks are to be told is written with what happened, leased to one deliverer at a time, and bounded."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update

from common.db.engine import Sessions, db_now
from common.db.rows import DeliveryRow, WebhookRow
from common.jobs import lifecycle
from common.jobs.lifecycle import Failure
from common.schemas.webhooks import WebhookChange, WebhookCreate
from common.settings import Settings
from common.webhooks import outbox, registry
from common.webhooks.outbox import Due, Result
from tests.contract.test_lifecycle import INFRA, LIMITS, PUBLISHED, Jobs

TAKEN, BROKEN = Result(204), Result(500, "the receiver answered 500")
SETTINGS = Settings()


class Hooks(Jobs):
    """Jobs, and webhooks that are told of them."""

    def hook(self, tenant: str = "t", **fields) -> str:
        asked = WebhookCreate(url="https://example.com/hook", **fields)
        return self.do(registry.create, SETTINGS, tenant, asked).id

    def outbox(self, **where) -> list[DeliveryRow]:
        with self.sessions.read() as session:
            return list(session.scalars(select(DeliveryRow).filter_by(**where).order_by(DeliveryRow.id)))

    def told(self, hook: str) -> list[str]:
        """Return the types of the messages in the order of their jobs' events."""
        rows = self.outbox(webhook_id=hook)
        return [row.type for row in sorted(rows, key=lambda row: (row.job_id, json.loads(row.body)["data"]["cursor"]))]

    def claim_due(self, most: int = 100, busy: tuple[str, ...] = ()) -> list[Due]:
        return self.do(outbox.claim, most, busy)

    def edit(self, **values) -> None:
        """Let time pass for every delivery."""
        self.do(lambda session: session.execute(update(DeliveryRow).values(values)))

    def delivery(self, delivery_id: str) -> DeliveryRow:
        [found] = self.outbox(id=delivery_id)
        return found

    def enabled(self, hook: str) -> bool:
        with self.sessions.read() as session:
            return session.scalars(select(WebhookRow).where(WebhookRow.id == hook)).one().disabled_at is None


@pytest.fixture
def hooks(sessions: Sessions) -> Hooks:
    return Hooks(sessions)


def test_every_change_of_status_is_told_once(hooks: Hooks):
    hook = hooks.hook()
    job_id = hooks.checked()
    hooks.do(lifecycle.pause, "t", job_id)
    hooks.do(lifecycle.resume, "t", job_id)
    claim = hooks.claim()
    hooks.do(lifecycle.advance, claim, progress={"step": 3}, events=[lifecycle.Event("job.failed", "not a status")])
    hooks.do(lifecycle.fault, claim, INFRA, LIMITS)
    job = ["job.validating", "job.queued", "job.paused", "job.queued", "job.running", "job.queued"]
    assert hooks.told(hook) == job
    lost = hooks.running()
    hooks.end_lease(lost.job_id)
    hooks.expire(lost.job_id)
    refused = hooks.submit()
    check = hooks.do(lifecycle.claim_preflight, "c", 60)
    hooks.do(lifecycle.reject, check, Failure("user_error", "bad_rows", "Row 7 is broken."))
    cancelled = hooks.submit()
    hooks.do(lifecycle.request_cancel, "t", cancelled)
    by_job = {row.job_id: [] for row in hooks.outbox()}
    for row in sorted(hooks.outbox(), key=lambda row: json.loads(row.body)["data"]["cursor"]):
        by_job[row.job_id].append(row.type.removeprefix("job."))
    assert by_job[lost.job_id] == ["validating", "queued", "running", "queued"]
    assert by_job[refused] == ["validating", "failed"]
    assert by_job[cancelled] == ["validating", "cancelled"]
    [failed] = hooks.outbox(type="job.failed")
    body = json.loads(failed.body)
    assert body["type"] == "job.failed" and body["data"]["error"]["code"] == "bad_rows"
    assert body["data"]["id"] == refused and body["data"]["status"] == "failed" and body["timestamp"].endswith("Z")


def test_only_what_was_asked_for_and_only_the_own_tenants_jobs(hooks: Hooks):
    ends, foreign, off = hooks.hook(events=["job.succeeded"]), hooks.hook("other"), hooks.hook()
    hooks.do(registry.change, SETTINGS, "t", off, WebhookChange(enabled=False))
    hooks.do(lifecycle.publish, hooks.running(), PUBLISHED, {})
    assert hooks.told(ends) == ["job.succeeded"]
    assert hooks.told(foreign) == [] and hooks.told(off) == []


def test_what_is_rolled_back_is_not_told(hooks: Hooks):
    hooks.hook()
    claim = hooks.running()
    before = len(hooks.outbox())
    with pytest.raises(RuntimeError), hooks.sessions.write() as session:
        lifecycle.publish(session, claim, PUBLISHED, {})
        raise RuntimeError("the process dies before the commit")
    assert len(hooks.outbox()) == before
    hooks.do(lifecycle.publish, claim, PUBLISHED, {})
    assert len(hooks.outbox(type="job.succeeded")) == 1


def test_a_delivery_has_one_deliverer_at_a_time(hooks: Hooks):
    for number in range(6):
        hooks.hook(description=str(number))
    hooks.submit()
    barrier = threading.Barrier(4)

    def deliver(_: int) -> list[str]:
        barrier.wait()
        return [due.id for _ in range(3) for due in hooks.claim_due(2)]

    with ThreadPoolExecutor(4) as pool:
        taken = [delivery for found in pool.map(deliver, range(4)) for delivery in found]
    assert sorted(taken) == sorted(row.id for row in hooks.outbox())
    assert hooks.claim_due() == []


def test_who_dies_with_a_delivery_loses_it(hooks: Hooks):
    hooks.hook()
    hooks.submit()
    [first] = hooks.claim_due()
    hooks.edit(lease_expires_at=db_now() - 1)
    [second] = hooks.claim_due()
    assert (second.id, second.body) == (first.id, first.body) and second.attempt == 2
    assert hooks.do(outbox.settle, first, BROKEN) is None, "whoever comes late writes nothing"
    assert hooks.do(outbox.settle, second, TAKEN) == "delivered"
    assert hooks.do(outbox.settle, second, BROKEN) is None
    assert hooks.delivery(first.id).attempts == 2


def test_attempts_follow_the_schedule_and_end(hooks: Hooks):
    hook = hooks.hook()
    hooks.submit()
    for pause_s in outbox.SCHEDULE_S:
        [due] = hooks.claim_due()
        assert hooks.do(outbox.settle, due, BROKEN) == "pending"
        assert hooks.claim_due() == []
        with hooks.sessions.read() as session:
            waits_s = session.scalar(select(DeliveryRow.next_at - db_now()))
        # Some seconds of it may have passed on a busy machine.
        assert 0.9 * pause_s - 3 < waits_s <= 1.1 * pause_s
        hooks.edit(next_at=db_now())
    assert 2.5 < sum(outbox.SCHEDULE_S) / 86_400 < 4, "days, and no more"
    [due] = hooks.claim_due()
    assert hooks.do(outbox.settle, due, BROKEN) == "failed"
    assert hooks.delivery(due.id).answer == 500 and not hooks.enabled(hook), "nothing was taken in all that time"
    hooks.submit()
    assert len(hooks.outbox()) == 1, "a webhook that is off is told nothing"


def test_a_webhook_that_took_something_meanwhile_stays(hooks: Hooks):
    hook = hooks.hook()
    first = hooks.submit()
    hooks.submit()
    hooks.edit(failures=len(outbox.SCHEDULE_S))
    one, other = sorted(hooks.claim_due(), key=lambda due: hooks.delivery(due.id).job_id != first)
    assert hooks.do(outbox.settle, other, TAKEN) == "delivered"
    assert hooks.do(outbox.settle, one, BROKEN) == "failed" and hooks.enabled(hook)


def test_gone_is_gone(hooks: Hooks):
    hook = hooks.hook()
    hooks.checked()
    gone, waiting = hooks.claim_due()
    assert hooks.do(outbox.settle, gone, Result(410, "the receiver answered 410")) == "failed"
    assert not hooks.enabled(hook)
    assert hooks.delivery(waiting.id).state == "failed" and "410 Gone" in hooks.delivery(waiting.id).error
    assert hooks.do(outbox.settle, waiting, TAKEN) is None and hooks.claim_due() == []
    hooks.do(registry.change, SETTINGS, "t", hook, WebhookChange(enabled=True))
    hooks.submit()
    assert len(hooks.claim_due()) == 1


def test_a_receiver_may_ask_for_a_longer_pause(hooks: Hooks):
    hooks.hook()
    hooks.submit()
    [due] = hooks.claim_due()
    hooks.do(outbox.settle, due, Result(503, "the receiver answered 503", retry_after_s=4000))
    with hooks.sessions.read() as session:
        assert 3990 < session.scalar(select(DeliveryRow.next_at - db_now())) <= 4000


def test_a_webhook_with_much_to_hear_leaves_places_to_others(hooks: Hooks):
    loud, quiet = hooks.hook("loud"), hooks.hook("quiet")
    for _ in range(10):
        hooks.submit("loud")
    hooks.submit("quiet")
    first = hooks.claim_due(3)
    assert {due.webhook_id for due in first} == {loud, quiet}
    rest = hooks.claim_due()
    assert [due.webhook_id for due in rest] == [loud] * outbox.PER_WEBHOOK
    assert hooks.claim_due(busy=(loud,)) == []


def test_old_deliveries_are_forgotten(hooks: Hooks):
    hooks.hook()
    hooks.checked()
    kept, old = hooks.claim_due()
    hooks.do(outbox.settle, old, TAKEN)
    hooks.edit(ended_at=DeliveryRow.ended_at - outbox.KEPT_S - 1)
    hooks.do(outbox.forget)
    assert [row.id for row in hooks.outbox()] == [kept.id]


def test_a_webhook_that_is_removed_takes_no_job_with_it(hooks: Hooks):
    """Whoever submits at that very moment succeeds, and no message is left behind."""
    ids = [hooks.hook() for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        removed = [pool.submit(hooks.do, registry.remove, "t", hook) for hook in ids]
        submitted = [pool.submit(hooks.submit) for _ in range(12)]
        for each in removed + submitted:
            each.result()
    assert hooks.outbox() == []
