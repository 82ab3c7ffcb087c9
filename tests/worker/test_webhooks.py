"""Webhooks arrive, signed, at a real receiver, whatever it answers and whoever dies; and nowhere else."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from standardwebhooks import WebhookVerificationError

from common.context import Context
from common.db.engine import db_now
from common.db.rows import DeliveryRow, WebhookRow
from common.jobs import lifecycle
from common.schemas.jobs import JobSpec
from common.schemas.webhooks import WebhookCreate
from common.webhooks import history, outbox, registry
from tests.processes import Processes, wait_until
from tests.worker.conftest import Bench
from tests.worker.peers import certificate
from tests.worker.receiver import Message, Receiver, receiving
from tests.worker.test_fetch import changed
from worker import posting
from worker.deliverer import Deliverer

SPEC = JobSpec(model="org/base", dataset="s3://bucket/train.jsonl")
LOOPBACK = "127.0.0.0/8"


class Sender:
    """An installation with webhooks, which are delivered while a block runs."""

    def __init__(self, context: Context):
        self.context = changed(context, fetch_networks=[LOOPBACK])

    def hook(self, url: str, tenant: str = "t") -> WebhookRow:
        with self.context.write() as session:
            return registry.create(session, self.context.settings, tenant, WebhookCreate(url=url))

    def submit(self, tenant: str = "t") -> str:
        with self.context.write() as session:
            return lifecycle.submit(session, tenant, SPEC)

    def rows(self) -> list[DeliveryRow]:
        with self.context.read() as session:
            return list(session.scalars(select(DeliveryRow).order_by(DeliveryRow.id)))

    def only(self) -> DeliveryRow:
        [row] = self.rows()
        return row

    def edit(self, **values: object) -> None:
        with self.context.write() as session:
            session.execute(update(DeliveryRow).values(values))

    def deliver_until(self, seen: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
        """Deliver until `seen()`."""
        stopped = threading.Event()
        deliverer = Deliverer(self.context, stopped)
        deliverer.start()
        try:
            wait_until(seen, timeout_s, what)
        finally:
            stopped.set()
            deliverer.join()

    def attempted(self, times: int = 1) -> DeliveryRow:
        """Deliver until the one delivery was tried so often, and return it."""
        self.deliver_until(
            lambda: self.only().attempts == times and self.only().lease_expires_at is None, f"attempt {times}"
        )
        return self.only()


@pytest.fixture
def sender(installation: Context) -> Sender:
    return Sender(installation)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def test_a_message_is_signed_as_the_specification_says(sender: Sender, receiver: Receiver):
    hook = sender.hook(receiver.url + "?from=tunery")
    job_id = sender.submit()
    row = sender.attempted()
    [message] = receiver.messages
    payload = message.verified(hook.secret)
    assert payload["type"] == "job.validating" and payload["data"]["id"] == job_id
    assert message.path == "/hook?from=tunery" and message.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert message.headers["content-type"] == "application/json"
    assert message.id == row.id and (row.state, row.answer) == ("delivered", 204)
    with pytest.raises(WebhookVerificationError):
        message.verified("whsec_" + "A" * 43 + "=")


def test_the_whole_life_of_a_job_is_told(bench: Bench, receiver: Receiver):
    sender = Sender(bench.context)
    hook = sender.hook(receiver.url)
    job_id = bench.submit(steps=2, team="red")
    bench.check()
    bench.train()
    sender.deliver_until(lambda: all(row.state == "delivered" for row in sender.rows()), "everything to be taken")
    told = sorted((message.verified(hook.secret) for message in receiver.messages), key=lambda it: it["data"]["cursor"])
    assert [payload["type"] for payload in told] == ["job.validating", "job.queued", "job.running", "job.succeeded"]
    last = told[-1]["data"]
    assert (last["id"], last["status"], last["step"], last["max_steps"]) == (job_id, "succeeded", 2, 2)
    assert last["metadata"] == {"team": "red"} and last["error"] is None


def test_during_a_rotation_both_secrets_verify(sender: Sender, receiver: Receiver):
    hook = sender.hook(receiver.url)
    with sender.context.write() as session:
        rotated = registry.rotate(session, "t", hook.id, 3600)
    sender.submit()
    sender.attempted()
    for secret in (hook.secret, rotated.secret):
        assert receiver.messages[0].verified(secret)
    with sender.context.write() as session:
        session.execute(update(WebhookRow).values(old_secret_until=db_now() - 1))
        history.redeliver(session, registry.own(session, "t", hook.id), sender.only().id)
    sender.attempted(2)
    assert receiver.messages[1].verified(rotated.secret)
    with pytest.raises(WebhookVerificationError):
        receiver.messages[1].verified(hook.secret)


def test_a_receiver_that_is_down_hears_it_later_with_the_same_id(sender: Sender):
    with receiving() as gone:
        hook = sender.hook(gone.url)
    sender.submit()
    row = sender.attempted()
    assert (row.state, row.failures, row.answer) == ("pending", 1, None) and "no answer" in row.error
    sender.edit(next_at=db_now())
    with receiving(port=gone.port) as back:
        assert sender.attempted(2).state == "delivered"
    [message] = back.messages
    assert message.id == row.id and message.verified(hook.secret)


@pytest.mark.parametrize(
    ("status", "headers", "state", "why"),
    [
        (500, {}, "pending", "answered 500"),
        (302, {"location": "http://127.0.0.1:{port}/elsewhere"}, "pending", "redirects, which is not followed"),
        (410, {}, "failed", "answered 410"),
        (199, {}, "pending", "no answer"),
    ],
)
def test_other_answers(sender: Sender, receiver: Receiver, status: int, headers: dict, state: str, why: str):
    given = {name: value.format(port=receiver.port) for name, value in headers.items()}
    receiver.answer = lambda _: (status, given)
    hook = sender.hook(receiver.url)
    sender.submit()
    row = sender.attempted()
    assert row.state == state and why in row.error
    assert [message.path for message in receiver.messages] == ["/hook"], "once, and nowhere else"
    with sender.context.read() as session:
        assert (registry.own(session, "t", hook.id).disabled_at is not None) == (status == 410)


def test_a_slow_receiver_holds_up_nobody_else(sender: Sender, receiver: Receiver):
    released = threading.Event()

    def late(_: Message) -> tuple[int, dict[str, str]]:
        released.wait(30)
        return 204, {}

    with receiving() as slow:
        slow.answer = late
        slow_hook, hook = sender.hook(slow.url), sender.hook(receiver.url)
        for _ in range(6):
            sender.submit()

        def states(which: WebhookRow) -> list[str]:
            return [row.state for row in sender.rows() if row.webhook_id == which.id]

        sender.deliver_until(lambda: states(hook) == ["delivered"] * 6, "the quick receiver to hear everything")
        assert states(slow_hook) == ["pending"] * 6
        assert len(slow.messages) == outbox.PER_WEBHOOK, "and it is not called more often than that at once"
        released.set()


def test_an_attempt_has_a_deadline(sender: Sender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(posting, "DEADLINE_S", 0.3)
    released = threading.Event()
    receiver.answer = lambda _: (204 if released.wait(30) else 500, {})
    sender.hook(receiver.url)
    sender.submit()
    row = sender.attempted()
    assert row.state == "pending" and row.error == "no answer within 0.3 s"
    released.set()


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "internal.example"])
def test_private_addresses_are_refused(sender: Sender, receiver: Receiver, host: str, monkeypatch: pytest.MonkeyPatch):
    """Also where the name was public when the webhook was made, or the operator has taken the network off the list."""
    real = socket.getaddrinfo

    def resolve(name: str, *rest: object, **options: object):
        return real("127.0.0.1" if name == "internal.example" else name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    sender.hook(receiver.url)
    with sender.context.write() as session:
        session.execute(update(WebhookRow).values(url=f"https://{host}:{receiver.port}/hook"))
    sender.context = changed(sender.context, fetch_networks=[])
    sender.submit()
    row = sender.attempted()
    assert row.state == "pending" and "neither public nor" in row.error and receiver.messages == []


def test_plain_http_stays_in_the_operators_networks(sender: Sender, receiver: Receiver, monkeypatch):
    sender.hook(receiver.url)
    with sender.context.write() as session:
        session.execute(update(WebhookRow).values(url="http://93.184.215.14/hook"))
    sender.submit()
    assert "neither public nor" in sender.attempted().error


def test_a_name_is_resolved_once_and_is_what_the_certificate_must_name(
    sender: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tls, authority = certificate(tmp_path, "hooks.example")
    real, asked = socket.getaddrinfo, []

    def resolve(name: str, *rest: object, **options: object):
        if name in ("hooks.example", "other.example"):
            asked.append(name)
            return real("127.0.0.1" if len(asked) % 2 else "169.254.169.254", *rest, **options)
        return real(name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    sender.context = changed(sender.context, ca_bundle=authority)
    with receiving(tls) as receiver:
        sender.hook(f"https://hooks.example:{receiver.port}/hook")
        sender.submit()
        assert sender.attempted().state == "delivered" and asked == ["hooks.example"]
        assert receiver.messages[0].headers["host"] == f"hooks.example:{receiver.port}"
        with sender.context.write() as session:
            session.execute(update(WebhookRow).values(url=f"https://other.example:{receiver.port}/hook"))
        asked.clear()
        sender.edit(state="pending", next_at=db_now(), attempts=0, ended_at=None)
        assert "certificate" in sender.attempted().error and len(receiver.messages) == 1


def test_an_error_of_the_database_does_not_show_a_secret(sender: Sender):
    hook = sender.hook("https://example.com/hook")
    with pytest.raises(IntegrityError) as broken, sender.context.write() as session:
        session.add(WebhookRow(id=hook.id, tenant="t", url="u", secret=hook.secret, created_at=0.0))
        session.flush()
    assert "webhooks" in str(broken.value) and hook.secret not in str(broken.value)
    due = outbox.Due("m", hook.id, hook.url, "{}", (hook.secret,), 1)
    assert hook.secret not in repr(due)


def test_a_sweeper_that_is_killed_while_it_delivers(sender: Sender, receiver: Receiver, tmp_path: Path):
    """What it had begun to tell is told again, once, by another one, with the same id; nothing before is repeated."""
    held = threading.Event()

    def answer(_: Message) -> tuple[int, dict[str, str]]:
        if not held.is_set():
            held.wait(30)
        return 204, {}

    receiver.answer = answer
    hook = sender.hook(f"{receiver.url}?token=hush")
    job_id = sender.submit()
    processes = Processes(tmp_path)
    sender.context = changed(sender.context, log_level="DEBUG")
    try:
        first = processes.start("first", ["worker", "sweeper"], sender.context.settings)
        wait_until(lambda: len(receiver.messages) == 1, 30, "the first attempt")
        first.signal(signal.SIGKILL)
        first.wait()
        held.set()
        row = sender.only()
        assert row.state == "pending" and row.lease_expires_at is not None, "nobody noted that it had arrived"
        second = processes.start("second", ["worker", "sweeper"], sender.context.settings)
        third = processes.start("third", ["worker", "sweeper"], sender.context.settings)
        second.wait_for("sweeping")
        third.wait_for("sweeping")
        assert len(receiver.messages) == 1, "it is leased still"
        sender.edit(lease_expires_at=db_now() - 1)
        wait_until(lambda: sender.only().state == "delivered", 20, "the second attempt")
        for process in (second, third):
            process.signal(signal.SIGTERM)
            assert process.wait(20) == 0, "a sweeper leaves in order"
    finally:
        processes.end()
    assert [message.id for message in receiver.messages] == [row.id] * 2
    log = first.said() + second.said() + third.said()
    assert f"{row.id} for {hook.id}, attempt 2: delivered" in log
    assert hook.secret not in log and "hush" not in log, "secrets and URLs stay out of the log"
    assert {message.verified(hook.secret)["data"]["id"] for message in receiver.messages} == {job_id}
