"""The queue explains itself truly: what it says of a job is what claims then do, on every database."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, insert, select, update

from common import workers
from common.db.engine import Sessions, db_month, db_now
from common.db.rows import JobRow, UsageRow
from common.errors import InvalidInput, NotFound, OverQuota, WrongState
from common.jobs import lifecycle, line, quotas, standing
from common.jobs.lifecycle import Event, Failure, Limits
from common.jobs.standing import Standing
from common.schemas.jobs import JobOrder
from common.schemas.quotas import Quota, QuotaLimits
from common.workers import Beat
from tests.contract.test_lifecycle import INFRA, LIMITS, PUBLISHED, Jobs

HOUR_S = 3600.0


class Queue(Jobs):
    """Jobs, and what is said of them."""

    def of(self, job_id: str) -> Standing:
        with self.sessions.read() as session:
            return standing.of(session, session.scalars(select(JobRow).where(JobRow.id == job_id)).one())

    def code(self, job_id: str) -> str | None:
        waits_for = self.of(job_id).waits_for
        return waits_for and waits_for.code

    def beat(self, worker: str, **changes: object) -> None:
        values = {"name": worker, "kind": "train", "device": "cpu", "device_name": None, "vram_bytes": None}
        self.do(workers.beat, Beat(worker, **(values | {"state": "idle"} | changes)))

    def limit(self, tenant: str, **limits: float) -> None:
        self.do(quotas.write, tenant, QuotaLimits(**limits))

    def quota(self, tenant: str) -> Quota:
        return self.do(quotas.read, tenant)

    def used(self, tenant: str, seconds: float, ended_ago_s: float = 0.0) -> None:
        """Note that a worker once held a job of the tenant for so long."""
        row = {"job_id": f"old_{random.random()}", "epoch": 1, "tenant": tenant}
        times = {"started_at": db_now() - ended_ago_s - seconds, "ended_at": db_now() - ended_ago_s}
        with self.sessions.write() as session:
            session.execute(insert(UsageRow).values(row | times))

    def edit(self, job_id: str, **values: object) -> None:
        with self.sessions.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(values))


@pytest.fixture
def queue(sessions: Sessions) -> Queue:
    return Queue(sessions)


def crowd(queue: Queue, rng: random.Random) -> list[str]:
    """Fill the queue with jobs of several tenants in every circumstance that the order knows."""
    running = [queue.checked(rng.choice("ab")) for _ in range(rng.randrange(4))]
    for number, _ in enumerate(running):
        queue.claim(f"w{number}")
    for tenant in "abc":
        queue.used(tenant, rng.choice([0, 90, 5000]))
    if rng.random() < 0.5:
        queue.limit("b", max_running=rng.randrange(4))
    if rng.random() < 0.3:
        queue.limit("c", max_gpu_hours=1.0)
    made = [queue.checked(rng.choice("abc"), priority=rng.choice([0, 0, 0, 5])) for _ in range(rng.randrange(4, 12))]
    for job_id in made:
        queue.age(job_id, rng.choice([0, 0, 30, 100, 100]))
        if rng.random() < 0.15:
            queue.edit(job_id, hold_until=db_now() + 1000)
        elif rng.random() < 0.2:
            # Put aside and taken up again: it waits anew, but is as old as it was.
            queue.edit(job_id, queued_at=db_now())
    return made


@pytest.mark.parametrize("seed", range(6))
def test_positions_are_the_order_of_the_claims(queue: Queue, seed: int):
    made = crowd(queue, random.Random(seed))
    said = {job_id: queue.of(job_id).position for job_id in made}
    claimed: list[str] = []
    while (claim := queue.do(lifecycle.claim, "w", 600)) is not None:
        claimed.append(claim.job_id)
    assert {job_id: position for job_id, position in said.items() if position is not None} == {
        job_id: number for number, job_id in enumerate(claimed, 1)
    }
    assert len(claimed) >= 2


def test_one_worker_is_shared_by_what_each_tenant_used_of_it(queue: Queue):
    older, newer = queue.checked("greedy"), queue.checked("modest")
    queue.age(older, 30), queue.age(newer, 20)
    queue.used("greedy", 7200)
    assert queue.of(newer).position == 1 and queue.claim().job_id == newer
    queue.used("modest", 9000)
    last = queue.checked("modest")
    queue.age(last, 40)
    with queue.sessions.write() as session:
        session.execute(update(JobRow).where(JobRow.id == newer).values(status="succeeded"))
    assert queue.claim().job_id == older, "the age of a job comes after its tenant's use"


def test_use_of_more_than_a_day_ago_counts_no_more(queue: Queue):
    older, newer = queue.checked("greedy"), queue.checked("modest")
    queue.age(older, 30), queue.age(newer, 20)
    queue.used("greedy", 7200, ended_ago_s=line.SHARE_S + 60)
    assert queue.claim().job_id == older


def test_what_each_job_waits_for(queue: Queue):
    checked_by_nobody = queue.submit()
    assert queue.code(checked_by_nobody) == "no_checker"
    queue.beat("p", kind="preflight")
    assert queue.code(checked_by_nobody) == "checkers_busy"
    claim = queue.do(lifecycle.claim_preflight, "p", 60)
    assert queue.code(checked_by_nobody) == "checking"
    queue.do(lifecycle.postpone, claim, INFRA, LIMITS)
    found = queue.of(checked_by_nobody)
    assert found.waits_for.code == "retry_pause" and found.waits_for.until is not None
    queue.edit(checked_by_nobody, not_before=0)
    queue.accept(queue.do(lifecycle.claim_preflight, "p", 60))
    job_id = checked_by_nobody
    assert queue.code(job_id) == "no_worker" and queue.of(job_id).position == 1
    queue.beat("w")
    assert queue.code(job_id) == "worker_free"
    queue.do(lifecycle.pause, "t", job_id)
    assert queue.code(job_id) == "paused" and queue.of(job_id).position is None
    queue.do(lifecycle.resume, "t", job_id)
    assert queue.claim("w").job_id == job_id
    assert queue.of(job_id) == Standing(), "a job that runs waits for nothing"
    next_one = queue.checked()
    found = queue.of(next_one)
    assert found.waits_for.code == "workers_busy" and job_id in found.waits_for.message
    stranger = queue.checked("stranger")
    assert queue.code(stranger) == "workers_busy" and job_id not in queue.of(stranger).waits_for.message
    found = queue.of(next_one)
    assert (found.position, found.waits_for.code) == (2, "fair_share"), "the stranger's job is younger"


def test_a_draining_or_silent_worker_takes_nothing(queue: Queue):
    job_id = queue.checked()
    queue.beat("w")
    queue.do(workers.drain, "w")
    assert queue.code(job_id) == "no_worker"
    queue.beat("v")
    with queue.sessions.write() as session:
        late = update(workers.WorkerRow).values(heartbeat_at=db_now() - workers.SILENT_S - 1)
        session.execute(late)
    assert queue.code(job_id) == "no_worker"


def test_a_job_is_not_started_before_its_time_but_checked(queue: Queue):
    later = datetime.now(UTC) + timedelta(hours=2)
    job_id = queue.checked(not_before=later)
    found = queue.of(job_id)
    assert found.position is None and found.waits_for.code == "not_before"
    assert abs(found.waits_for.until - later) < timedelta(seconds=1)
    assert queue.do(lifecycle.claim, "w", 60) is None
    queue.do(lifecycle.reorder, "t", job_id, JobOrder(not_before=None))
    assert queue.claim().job_id == job_id


def test_a_pause_and_a_fault_keep_the_time_that_was_asked_for(queue: Queue):
    job_id = queue.checked(not_before=datetime.now(UTC) + timedelta(hours=2))
    queue.do(lifecycle.pause, "t", job_id)
    queue.do(lifecycle.resume, "t", job_id)
    assert queue.code(job_id) == "not_before"


@pytest.mark.parametrize("state", ["validating", "queued", "paused"])
def test_reordering_ones_own(queue: Queue, state: str):
    first = queue.checked()
    queue.age(first, 50)
    job_id = queue.submit() if state == "validating" else queue.checked()
    if state == "paused":
        queue.do(lifecycle.pause, "t", job_id)
    queue.do(lifecycle.reorder, "t", job_id, JobOrder(priority=7))
    row = queue.row(job_id)
    assert (row.priority, row.hold_until, row.status) == (7, 0.0, state)
    if state == "queued":
        assert queue.claim().job_id == job_id
    assert "job.reordered" in queue.events(job_id)


def test_what_runs_or_is_anothers_is_not_reordered(queue: Queue):
    claim = queue.running()
    with pytest.raises(WrongState):
        queue.do(lifecycle.reorder, "t", claim.job_id, JobOrder(priority=1))
    with pytest.raises(NotFound):
        queue.do(lifecycle.reorder, "other", queue.checked(), JobOrder(priority=1))


def test_no_more_jobs_run_than_may_however_many_workers_ask(queue: Queue):
    queue.limit("t", max_running=2)
    wanted = [queue.checked() for _ in range(6)]
    other = queue.checked("other")
    got: list[str] = []
    start = threading.Barrier(5)

    def work(name: str) -> None:
        start.wait()
        while (claim := queue.do(lifecycle.claim, name, 600)) is not None:
            got.append(claim.job_id)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(5)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert other in got and len(got) == 3 and len(set(got) & set(wanted)) == 2
    waiting = next(job_id for job_id in wanted if job_id not in got)
    assert queue.code(waiting) == "quota_running" and queue.of(waiting).position is None


def test_no_more_jobs_wait_than_may_however_many_are_sent_at_once(queue: Queue):
    queue.limit("t", max_queued=3)
    queue.submit("other")
    outcomes: list[str] = []
    start = threading.Barrier(6)

    def send() -> None:
        start.wait()
        try:
            outcomes.append(queue.submit())
        except OverQuota as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=send) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len(outcomes) == 6 and outcomes.count("quota_queued") == 3
    assert queue.quota("t").queued == 3
    queue.do(lifecycle.request_cancel, "t", next(job_id for job_id in outcomes if job_id != "quota_queued"))
    queue.submit()


def test_priorities_above_the_tenants_are_refused(queue: Queue):
    queue.limit("t", max_priority=5)
    queue.submit(priority=5)
    with pytest.raises(InvalidInput, match="above 5"):
        queue.submit(priority=6)
    with pytest.raises(InvalidInput, match="above 5"):
        queue.do(lifecycle.reorder, "t", queue.submit(), JobOrder(priority=6))


def test_a_tenant_without_hours_waits_for_the_next_month(queue: Queue):
    job_id = queue.checked()
    queue.limit("t", max_gpu_hours=2.0)
    queue.used("t", 1.9 * HOUR_S)
    assert queue.of(job_id).position == 1 or datetime.now(UTC).day == 1
    with queue.sessions.write() as session:
        # Half of it in this month, whatever the day is: the other half counts for the last one.
        session.execute(delete(UsageRow))
        times = {"started_at": db_month() - 3 * HOUR_S, "ended_at": db_month() + 1.5 * HOUR_S}
        session.execute(insert(UsageRow).values(job_id="x", epoch=1, tenant="t", **times))
    assert queue.quota("t").gpu_hours == pytest.approx(1.5, abs=0.01)
    assert queue.of(job_id).position == 1
    queue.limit("t", max_gpu_hours=1.5)
    found = queue.of(job_id)
    assert (found.position, found.waits_for.code) == (None, "quota_gpu_hours")
    now = datetime.now(UTC)
    assert found.waits_for.until.day == 1 and now < found.waits_for.until < now + timedelta(days=32)
    assert queue.do(lifecycle.claim, "w", 60) is None
    queue.limit("t", max_gpu_hours=1.6)
    assert queue.claim().job_id == job_id


ENDS: dict[str, Callable] = {
    "publish": lambda session, claim: lifecycle.publish(session, claim, PUBLISHED, {}),
    "fail": lambda session, claim: lifecycle.fail(session, claim, INFRA),
    "fault": lambda session, claim: lifecycle.fault(session, claim, INFRA, LIMITS),
    "crash loop": lambda session, claim: lifecycle.fault(
        session, claim, Failure("crash", "died", "It died."), Limits(1, 1)
    ),
    "release": lambda session, claim: lifecycle.release(session, claim, Event("job.released", "x")),
    "expire": lambda session, claim: lifecycle.expire(session, [claim.job_id]),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_every_end_of_an_attempt_is_counted_once_and_outlives_the_job(queue: Queue, end: Callable):
    claim = queue.running()
    queue.edit(claim.job_id, claimed_at=db_now() - HOUR_S, lease_expires_at=db_now() + 60)
    before = queue.quota("t")
    assert before.running == 1 and before.gpu_hours == pytest.approx(1.0, abs=0.01)
    if end is ENDS["expire"]:
        queue.end_lease(claim.job_id)
    queue.do(end, claim)
    assert queue.quota("t").running == 0
    with queue.sessions.write() as session:
        session.execute(delete(JobRow).where(JobRow.id == claim.job_id))
    assert queue.quota("t").gpu_hours == pytest.approx(1.0, abs=0.01)


def measured(queue: Queue, base_id: str, tokens_per_s: float, train_s: float, held_s: float) -> None:
    """Let a job on `base_id` have succeeded at that speed."""
    claim = queue.running(base_id=base_id)
    queue.edit(claim.job_id, claimed_at=db_now() - held_s)
    queue.do(lifecycle.publish, claim, PUBLISHED, {"tokens_per_s": tokens_per_s, "train_s": train_s})


def test_the_start_follows_from_what_runs_and_what_comes_before(queue: Queue):
    measured(queue, "org/base", tokens_per_s=100.0, train_s=50.0, held_s=60.0)
    queue.beat("w1"), queue.beat("w2")
    runs = [queue.checked(), queue.checked()]
    for worker, job_id, eta_s in zip(("w1", "w2"), runs, (100.0, 600.0), strict=True):
        assert queue.claim(worker).job_id == job_id
        queue.edit(job_id, eta_s=eta_s)
    first, second, third = (queue.checked() for _ in range(3))
    for job_id in (first, second):
        queue.edit(job_id, preflight={"train_tokens": 20_000})
    now = datetime.now(UTC).timestamp()
    starts = [queue.of(job_id).start_at - now for job_id in (first, second, third)]
    # The first takes 20,000 tokens / 100 and ten seconds around it, on the worker that is free first.
    assert starts == pytest.approx([100, 100 + 210, 100 + 210 + 210], abs=3)
    queue.edit(second, preflight={"train_tokens": None})
    assert queue.of(third).start_at - now == pytest.approx(600, abs=3), "the other worker is known to be free by then"
    queue.edit(runs[1], eta_s=None)
    assert queue.of(third).start_at is None and queue.of(third).position == 3
    queue.edit(runs[1], preflight={"train_tokens": 40_000}, claimed_at=db_now() - 100)
    assert queue.of(third).start_at - now == pytest.approx(310, abs=3), "400 s and 10 around it, 100 of them over"


def test_without_a_measured_speed_nothing_is_promised(queue: Queue):
    queue.beat("w")
    queue.checked()
    queue.claim("w")
    first, second = queue.checked(), queue.checked()
    queue.edit(first, preflight={"train_tokens": 1000})
    assert queue.of(first).start_at is None and queue.of(second).start_at is None
