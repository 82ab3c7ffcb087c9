"""`lifecycle` as a state machine: what several workers, checkers, sweepers and users do in any order, against a model.

Claims are kept for ever and tried again when they are stale. Time passes by editing rows, and at no other time: a
loaded machine that stands still for seconds must not end a pause that the model believes in. Some verbs are run at the
same moment in two transactions: what comes out must be what one of the two orders gives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Row, delete, event, select, text, update

import migrations
from common.db.engine import Sessions, db_now, make_engine
from common.db.rows import CheckpointRow, EventRow, JobRow, MetricRow, UsageRow
from common.errors import LeaseLost, WrongState
from common.jobs import lifecycle
from common.jobs.lifecycle import Claim, Event, Failure, Limits, MetricPoint, Published
from common.schemas.jobs import JobSpec
from tests.faults import model

SPEC = JobSpec(model="org/base", dataset="s3://bucket/train.jsonl")
LIMITS = Limits(crash_loop_attempts=model.CRASHES_MAX, retry_max_s=1000.0)
LEASE_S = 1000.0
FAR_S = 1e6
# What SQLite's clock may be behind.
TICK_S = 0.01
JOBS_MAX = 4
ACCEPTED: dict[str, Any] = {"base_id": "b", "base_revision": None, "dataset_sha256": "d", "report": {}}

# By number and modulo: which claims there are may hang on how two transactions met, and hypothesis' draws must not.
NUMBERS = st.integers(0, 59)
KINDS = st.sampled_from(("crash", "oom", "infra", "refused"))

# One thing that somebody does to one job: how the product does it, and what the model makes of it.
Deed = tuple[Callable[[Any], Any], Callable[[model.Job], model.Outcome]]


def published(claim: Claim) -> Published:
    key = f"{claim.tenant}/{claim.job_id}/a{claim.epoch}/manifest.json"
    return Published(key, "f" * 64, [{"name": "manifest.json", "key": key, "bytes": 1, "sha256": "f" * 64}])


def failure(kind: str) -> Failure:
    return Failure(kind, "code", "message", attempts=model.REFUSED_MAX if kind == "refused" else None)


def deeds_of_worker(claim: Claim, step: int, kind: str) -> dict[str, Deed]:
    holder = (claim.worker_id, claim.epoch)
    tell = {"step": step, "prefix": "p/", "manifest_sha256": "f" * 64, "num_bytes": 1}
    return {
        "renew": (lambda s: lifecycle.renew(s, claim), lambda j: model.renew(j, holder)),
        "advance": (
            lambda s: lifecycle.advance(s, claim, events=[Event("n", "x")], metrics=[MetricPoint(step, {"loss": 1.0})]),
            lambda j: model.advance(j, holder),
        ),
        "checkpointed": (
            lambda s: lifecycle.checkpointed(s, claim, **tell), lambda j: model.checkpointed(j, holder, step),
        ),
        "publish": (lambda s: lifecycle.publish(s, claim, published(claim), {}), lambda j: model.publish(j, holder)),
        "fail": (lambda s: lifecycle.fail(s, claim, failure("user_error")), lambda j: model.fail(j, holder)),
        "release": (lambda s: lifecycle.release(s, claim, Event("r", "x")), lambda j: model.release(j, holder)),
        "fault": (lambda s: lifecycle.fault(s, claim, failure(kind), LIMITS), lambda j: model.fault(j, holder, kind)),
        "accept": (lambda s: lifecycle.accept(s, claim, **ACCEPTED), lambda j: model.accept(j, holder)),
        "reject": (lambda s: lifecycle.reject(s, claim, failure("user_error")), lambda j: model.reject(j, holder)),
        "postpone": (
            lambda s: lifecycle.postpone(s, claim, failure(kind), LIMITS), lambda j: model.postpone(j, holder, kind),
        ),
    }  # fmt: skip


def deeds_of_others(job: model.Job) -> dict[str, Deed]:
    return {
        "cancel": (lambda s: lifecycle.request_cancel(s, job.tenant, job.id), model.request_cancel),
        "pause": (lambda s: lifecycle.pause(s, job.tenant, job.id), model.pause),
        "resume": (lambda s: lifecycle.resume(s, job.tenant, job.id), model.resume),
        "expire": (lambda s: lifecycle.expire(s, [job.id]).get(job.id), model.expire),
    }


def chosen(claims: list[Claim], which: int) -> Claim | None:
    return claims[which % len(claims)] if claims else None


WORKERS_DEEDS = tuple(deeds_of_worker(Claim("", "", 0, "", 0), 0, ""))
OTHERS_DEEDS = tuple(deeds_of_others(model.Job("", "", 0, 0)))


class LifeOfJobs(RuleBasedStateMachine):
    """Does the same to the database and to the model, and compares. `sessions` is set by the test."""

    sessions: Sessions
    pool: ThreadPoolExecutor

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, model.Job] = {}
        self.claims: list[Claim] = []
        self.versions: dict[str, int] = {}
        self.touched: set[str] = set()
        with self.sessions.write() as session:
            session.execute(delete(JobRow))
            # What tenants used counts towards their share for a day.
            session.execute(delete(UsageRow))

    # ---- the way in ----

    @initialize()
    def begin(self) -> None:
        self.submit("a", 0)

    @rule(tenant=st.sampled_from("ab"), priority=st.sampled_from((0, 0, 0, 5)))
    def submit(self, tenant: str, priority: int) -> None:
        if len(self.jobs) == JOBS_MAX:
            return
        job_id = self.done(lambda s: lifecycle.submit(s, tenant, SPEC.model_copy(update={"priority": priority})))
        self.know(model.Job(job_id, tenant, priority, len(self.jobs)))

    @rule(worker=st.sampled_from(("w1", "w2")))
    def claim(self, worker: str) -> None:
        self.take(worker, "queued", lambda s: lifecycle.claim(s, worker, LEASE_S))

    @rule(worker=st.sampled_from(("c1", "c2")))
    def claim_preflight(self, worker: str) -> None:
        self.take(worker, "validating", lambda s: lifecycle.claim_preflight(s, worker, LEASE_S))

    @rule()
    def check_and_claim(self) -> None:
        """The way of most jobs; what is of interest mostly comes after it."""
        claim = self.take("c1", "validating", lambda s: lifecycle.claim_preflight(s, "c1", LEASE_S))
        if claim is not None:
            self.do(claim.job_id, deeds_of_worker(claim, 0, "")["accept"])
        self.claim("w1")

    def take(self, worker: str, status: str, verb: Callable[[Any], Claim | None]) -> Claim | None:
        self.stop_the_clock()
        due = model.best(list(self.jobs.values()), status)
        claim = self.done(verb)
        assert (claim and claim.job_id) == (due and due.id), f"claimed {claim}, and {due} is due"
        if claim is None or due is None:
            return None
        self.jobs[due.id] = model.taken(due, worker)
        self.touched.add(due.id)
        self.claims.append(claim)
        assert claim.epoch == self.jobs[due.id].epoch and claim.desired == due.desired
        return claim

    def stop_the_clock(self) -> None:
        """Let the order of claims know nothing of how long this run has really taken."""
        waiting = [job.id for job in self.jobs.values() if job.waits]
        with self.sessions.write() as session:
            session.execute(update(JobRow).values(claimed_at=db_now(), queued_at=db_now()))
            session.execute(update(UsageRow).values(started_at=UsageRow.ended_at))
            session.execute(update(JobRow).where(JobRow.id.in_(waiting)).values(not_before=db_now() + FAR_S))

    # ---- what is done to a job ----

    def held(self) -> list[Claim]:
        """Return the claims that still count."""
        jobs = ((claim, self.jobs[claim.job_id]) for claim in self.claims)
        return [claim for claim, job in jobs if job.alive and job.holder == (claim.worker_id, claim.epoch)]

    @rule(which=NUMBERS, verb=st.sampled_from(WORKERS_DEEDS), step=st.integers(1, 3), kind=KINDS)
    def work(self, which: int, verb: str, step: int, kind: str) -> None:
        claim = chosen(self.held(), which)
        if claim is None:
            return
        self.do(claim.job_id, deeds_of_worker(claim, step, kind)[verb])

    @rule(which=NUMBERS, verb=st.sampled_from(WORKERS_DEEDS), step=st.integers(1, 3), kind=KINDS)
    def work_on_any_claim(self, which: int, verb: str, step: int, kind: str) -> None:
        claim = chosen(self.claims, which)
        if claim is None:
            return
        self.do(claim.job_id, deeds_of_worker(claim, step, kind)[verb])

    @rule(which=NUMBERS, kind=KINDS)
    def break_and_claim_again(self, which: int, kind: str) -> None:
        claim = chosen(self.held(), which)
        if claim is None:
            return
        self.do(claim.job_id, deeds_of_worker(claim, 1, kind)["fault"])
        with self.sessions.write() as session:
            session.execute(update(JobRow).where(JobRow.id == claim.job_id).values(not_before=0.0))
        self.jobs[claim.job_id] = self.jobs[claim.job_id].but(waits=False)
        self.claim(claim.worker_id)

    @rule(which=NUMBERS, verb=st.sampled_from(OTHERS_DEEDS))
    def wish(self, which: int, verb: str) -> None:
        job = self.job(which)
        self.do(job.id, deeds_of_others(job)[verb])

    @rule(which=NUMBERS)
    def time_passes(self, which: int) -> None:
        """A lease ends, or a pause before the next try."""
        job = self.job(which)
        late = {"lease_expires_at": db_now() - 1} if job.holder else {}
        with self.sessions.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job.id).values(not_before=0.0, **late))
        self.jobs[job.id] = job.but(alive=False, waits=False)

    @rule(
        which=NUMBERS, first=st.sampled_from(WORKERS_DEEDS), kind=KINDS,
        second=st.sampled_from((*WORKERS_DEEDS, *OTHERS_DEEDS)),
    )  # fmt: skip
    def at_once(self, which: int, first: str, second: str, kind: str) -> None:
        """Two transactions at the same moment: one of both orders must explain what they did."""
        claim = chosen(self.held() or self.claims, which)
        if claim is None:
            return
        job = self.jobs[claim.job_id]
        known = deeds_of_worker(claim, 1, kind) | deeds_of_others(job)
        one, two = known[first], known[second]
        start, began = threading.Barrier(2), time.time()
        answers = [self.pool.submit(self.answer, deed, start) for deed in (one[0], two[0])]
        got = [answer.result(30) for answer in answers]
        row = self.row(job.id)
        explained = [
            after
            for expected, after in self.orders(job, one, two, skips="expire" in (first, second))
            if expected == got and seen(row) == told(after)
        ]
        assert explained, f"{first} and {second} on {job} answered {got}, and left {seen(row)}"
        self.became(explained[0], began, pause_s=1.0)

    @staticmethod
    def orders(job: model.Job, one: Deed, two: Deed, *, skips: bool) -> Iterator[tuple[list[Any], model.Job]]:
        first, between = one[1](job)
        second, after = two[1](between)
        yield [first, second], after
        second, between = two[1](job)
        first, after = one[1](between)
        yield [first, second], after
        if skips:
            # The sweeper passes over a row that another transaction holds.
            first, after = one[1](job)
            yield [first, None], after

    @rule(which=NUMBERS)
    def retry(self, which: int) -> None:
        job = self.job(which)
        if len(self.jobs) == JOBS_MAX:
            return
        made = self.answer(lambda s: lifecycle.retry(s, job.tenant, job.id))
        assert (made == model.WRONG) == (job.status not in ("failed", "cancelled"))
        if made != model.WRONG:
            again = model.Job(made, job.tenant, job.priority, len(self.jobs))
            # The best of each step; epoch 0 is nobody's.
            self.know(again.but(checkpoints=frozenset((0, step) for _, step in job.checkpoints)))

    # ---- how ----

    def job(self, which: int) -> model.Job:
        """Return one of the jobs."""
        return list(self.jobs.values())[which % len(self.jobs)]

    def know(self, job: model.Job) -> None:
        """Take a new job into the model."""
        # Ages by hand: jobs made in the same millisecond have no order.
        with self.sessions.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job.id).values(created_at=job.order))
        self.jobs[job.id] = job
        self.touched.add(job.id)

    def answer(self, deed: Callable[[Any], Any], start: threading.Barrier | None = None) -> Any:
        """Return what a deed answers; a refusal is an answer."""
        if start is not None:
            start.wait(30)
        try:
            return self.done(deed)
        except LeaseLost:
            return model.LOST
        except WrongState:
            return model.WRONG

    def done(self, deed: Callable[[Any], Any]) -> Any:
        with self.sessions.write() as session:
            return deed(session)

    def do(self, job_id: str, deed: Deed) -> None:
        expected, after = deed[1](self.jobs[job_id])
        before, began, got = self.jobs[job_id], time.time(), self.answer(deed[0])
        assert got == expected, f"answered {got!r} and not {expected!r}, at {before}"
        self.became(after, began, pause_s=min(2.0 ** (before.faults + before.crashes), LIMITS.retry_max_s))

    def became(self, after: model.Job, began: float, pause_s: float) -> None:
        """Take over what deeds made of a job; a pause that they began must be `pause_s` or longer."""
        before, self.jobs[after.id] = self.jobs[after.id], after
        self.touched.add(after.id)
        if after.waits and not before.waits:
            assert self.row(after.id).not_before >= began + pause_s - TICK_S

    def row(self, job_id: str) -> Row[Any]:
        with self.sessions.read() as session:
            return session.execute(select(JobRow.__table__).where(JobRow.id == job_id)).one()

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        for job_id in self.touched:
            row, job = self.row(job_id), self.jobs[job_id]
            assert seen(row) == told(job)
            assert row.version >= self.versions.get(job_id, 0)
            assert (row.finished_at is not None) == (row.status in model.ENDED)
            self.versions[job_id] = row.version
        self.touched.clear()

    def teardown(self) -> None:
        for job in self.jobs.values():
            with self.sessions.read() as session:
                names = [
                    *session.execute(select(EventRow.seq, EventRow.name).where(EventRow.job_id == job.id)),
                    *session.execute(select(MetricRow.seq, MetricRow.kind).where(MetricRow.job_id == job.id)),
                ]
                steps = session.execute(
                    select(CheckpointRow.epoch, CheckpointRow.step).where(CheckpointRow.job_id == job.id)
                )
                assert {(row.epoch, row.step) for row in steps} == job.checkpoints
            ends = [name for _, name in names if name.removeprefix("job.") in model.ENDED]
            assert len(ends) == job.ends <= 1, f"{job} tells of its end by {ends}"
            assert sorted(seq for seq, _ in names) == list(range(1, self.row(job.id).seq + 1))


def seen(row: Row[Any]) -> tuple[Any, ...]:
    holder = (row.worker_id, row.epoch) if row.worker_id else None
    leased = row.lease_expires_at is not None
    manifest = row.manifest_key.rsplit("/", 2)[1] if row.manifest_key else None
    return row.status, row.desired, row.epoch, holder, leased, row.crashes, row.faults, row.shrink, manifest


def told(job: model.Job) -> tuple[Any, ...]:
    leased, manifest = job.holder is not None, f"a{job.epoch}" if job.status == "succeeded" else None
    return job.status, job.desired, job.epoch, job.holder, leased, job.crashes, job.faults, job.shrink, manifest


@contextmanager
def fast_sessions(url: str) -> Iterator[Sessions]:
    """A migrated database that need not survive the power."""
    engine = make_engine(url)
    if url.startswith("sqlite"):
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    migrations.upgrade(engine)
    if not url.startswith("sqlite"):
        with engine.begin() as connection:
            connection.execute(text("ALTER ROLE postgres SET synchronous_commit = off"))
        engine.dispose()
    yield Sessions(engine)
    engine.dispose()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_every_order_of_deeds_keeps_the_promises(database: str, request: pytest.FixtureRequest):
    url = request.getfixturevalue(f"{database}_url")
    examples = request.config.getoption("machine_examples", 500) // 2
    with fast_sessions(url) as sessions, ThreadPoolExecutor(2) as pool:
        machine = type("Life", (LifeOfJobs,), {"sessions": sessions, "pool": pool})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=30, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), print_blob=True,
            ),
        )  # fmt: skip
