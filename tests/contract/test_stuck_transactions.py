"""A worker may be frozen, or cut off, in the middle of a transaction, or lose the answer to a commit that succeeded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from common.db.engine import Sessions, db_now, make_engine
from common.db.rows import JobRow
from common.errors import LeaseLost
from common.jobs import lifecycle, queries
from common.jobs.lifecycle import Event, MetricPoint, user
from tests.contract.test_lifecycle import PUBLISHED, WORKER_WRITES, Jobs
from tests.processes import wait_until

# Several rows go to Postgres as a pipeline, which once took its timer back.
MANY = replace(PUBLISHED, artifacts=[{"name": name, "key": "k", "bytes": 1, "sha256": "f"} for name in "abc"])


@pytest.fixture
def jobs(sessions: Sessions) -> Jobs:
    return Jobs(sessions)


@pytest.fixture
def postgres_jobs(postgres_url: str) -> Iterator[Jobs]:
    engine = make_engine(postgres_url)
    yield Jobs(Sessions(engine))
    engine.dispose()


def test_a_checkpoint_that_is_told_twice_is_kept_once(jobs: Jobs):
    claim = jobs.running()
    told = {"step": 5, "prefix": "p/", "manifest_sha256": "f" * 64, "num_bytes": 10}
    for _ in range(2):
        jobs.do(lifecycle.checkpointed, claim, **told)
    with jobs.sessions.read() as session:
        assert [found.step for found in queries.checkpoints(session, claim.job_id)] == [5]
    assert jobs.events(claim.job_id).count("job.checkpointed") == 1


def test_a_checkpoint_that_is_told_twice_at_once_is_kept_once(jobs: Jobs):
    claim = jobs.running()
    both = threading.Barrier(2)

    def tell(step: int) -> None:
        both.wait(10)
        jobs.do(lifecycle.checkpointed, claim, step=step, prefix="p/", manifest_sha256="f" * 64, num_bytes=10)

    with ThreadPoolExecutor(2) as pool:
        for step in range(1, 9):
            list(pool.map(tell, (step, step)))
    assert jobs.events(claim.job_id).count("job.checkpointed") == 8


def test_metrics_that_are_told_twice_are_shown_once(jobs: Jobs):
    claim = jobs.running()
    points = [MetricPoint(step, {"loss": 1.0}) for step in (1, 2)]
    for _ in range(2):
        jobs.do(lifecycle.advance, claim, metrics=points)
    with jobs.sessions.read() as session:
        assert [point.step for point in queries.metrics(session, claim.job_id).data] == [1, 2]


@pytest.mark.parametrize("write", WORKER_WRITES.values(), ids=WORKER_WRITES)
def test_a_write_that_waited_for_its_row_until_the_lease_had_ended_is_refused(jobs: Jobs, write: Callable):
    """Whoever held the row gave it back as it was: Postgres does not ask the UPDATE's conditions a second time."""
    jobs.checked()
    claim = jobs.claim(lease_s=1.0)
    before = jobs.row(claim.job_id).version
    with ThreadPoolExecutor(1) as pool, pytest.raises(LeaseLost):
        with jobs.sessions.write() as session:
            session.execute(select(JobRow.id).where(JobRow.id == claim.job_id).with_for_update())
            written = pool.submit(jobs.do, write, claim)
            ended = select(JobRow.lease_expires_at < db_now()).where(JobRow.id == claim.job_id)
            wait_until(lambda: bool(session.scalar(ended)), 10, "the end of the lease")
            session.rollback()
        written.result(30)
    assert jobs.row(claim.job_id).version == before


def test_a_stuck_transaction_does_not_keep_the_sweeper_from_other_jobs(postgres_jobs: Jobs):
    jobs = postgres_jobs
    other = jobs.running()
    jobs.checked()
    stuck = jobs.claim(lease_s=0.5)
    found: list[str | None] = []

    def sweep() -> None:
        found.extend(jobs.expire(claim.job_id) for claim in (stuck, other))

    with jobs.sessions.write() as session:
        lifecycle.advance(session, stuck, progress={"step": 1})
        jobs.end_lease(other.job_id)
        wait_until(lambda: _late(jobs, stuck.job_id), 10, "the lease to end")
        sweeping = threading.Thread(target=sweep, daemon=True)
        sweeping.start()
        sweeping.join(5)
        assert found == [None, "queued"], "the sweeper waits for a row that somebody holds"
    assert jobs.expire(stuck.job_id) == "queued"


def _late(jobs: Jobs, job_id: str) -> bool:
    with jobs.sessions.read() as session:
        return bool(session.scalar(select(JobRow.id).where(JobRow.id == job_id, JobRow.lease_expires_at < db_now())))


def test_a_transaction_that_is_left_open_is_ended_by_the_database(postgres_jobs: Jobs):
    jobs = postgres_jobs
    stale = jobs.running()
    with jobs.sessions.read() as session:
        assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "10s"
    with pytest.raises(DBAPIError), jobs.sessions.write() as session:
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '300ms'"))
        # Frozen between the guard and the commit: the lease ends, and nobody could take the job while the row is held.
        lifecycle.publish(session, stale, MANY, {})
        jobs_seen = Jobs(jobs.sessions)
        wait_until(lambda: _freed(jobs_seen, stale.job_id), 10, "the database to end the transaction")
    fresh = jobs.claim("other")
    with pytest.raises(LeaseLost):
        jobs.do(lifecycle.publish, stale, PUBLISHED, {})
    jobs.do(lifecycle.publish, fresh, PUBLISHED, {})
    assert jobs.events(stale.job_id).count("job.succeeded") == 1


def _freed(jobs: Jobs, job_id: str) -> bool:
    """End the lease as time would, once the row can be had, and let the sweeper find it."""
    query = text("SELECT id FROM jobs WHERE id = :id FOR UPDATE SKIP LOCKED")
    with jobs.sessions.write() as session:
        if session.scalar(query, {"id": job_id}) is None:
            return False
    jobs.end_lease(job_id)
    return jobs.expire(job_id) == "queued"


@pytest.mark.parametrize("wish", [lifecycle.request_cancel, lifecycle.pause])
@pytest.mark.parametrize("move", ["release", "claim"])
def test_a_wish_meets_a_job_that_moves_at_the_same_moment(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, wish: Callable, move: str
):
    job_id = jobs.checked()
    claim = jobs.claim() if move == "release" else None
    real, moving = user.change, []

    def move_it() -> None:
        if claim is not None:
            jobs.do(lifecycle.release, claim, Event("job.released", "x"))
        else:
            jobs.do(lifecycle.claim, "w", 60)

    def change_between_two_looks(*arguments: object) -> object:
        changed = real(*arguments)
        if not moving:
            moving.append(threading.Thread(target=move_it))
            moving[0].start()
            moving[0].join(1)  # over now, unless it waits for this transaction
        return changed

    monkeypatch.setattr(user, "change", change_between_two_looks)
    jobs.do(wish, "t", job_id)
    moving[0].join(30)
    row = jobs.row(job_id)
    wished = row.status if row.status != "running" else {"cancel": "cancelled", "pause": "paused"}[row.desired]
    assert wished == {"request_cancel": "cancelled", "pause": "paused"}[wish.__name__], (row.status, row.desired)
