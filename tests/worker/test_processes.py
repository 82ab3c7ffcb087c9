"""Real worker and sweeper processes under Celery, a real broker, and the faults that kill them."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import update

from common.db.rows import WorkerRow
from common.jobs import lifecycle
from common.jobs.doorbell import celery_app
from tests.processes import Process, Processes, wait_until
from tests.worker.conftest import TENANT, Bench
from worker.lookout import LOOK_S


class Fleet:
    """The processes of one installation."""

    def __init__(self, bench: Bench, processes: Processes):
        self.bench = bench
        self._processes = processes

    def start(self, kind: str, name: str = "", *arguments: str, **changes: object) -> Process:
        """Start a process of a kind and wait until it works."""
        process = self.run(kind, *arguments, worker_name=name or kind, **changes)
        process.wait_for({"sweeper": "sweeping"}.get(kind, "ready"))
        return process

    def run(self, kind: str, *arguments: str, worker_name: str = "", **changes: object) -> Process:
        """Start a process of a kind with changed settings."""
        settings = self.bench.context.settings.model_copy(update={"worker_name": worker_name or kind} | changes)
        return self._processes.start(worker_name or kind, ["worker", kind, *arguments], settings)


@pytest.fixture
def fleet(bench: Bench, tmp_path: Path) -> Iterator[Fleet]:
    """No process outlives the test."""
    processes = Processes(tmp_path)
    yield Fleet(bench, processes)
    processes.end()


def trainer_of(process: Process) -> psutil.Process:
    """Return the trainer that a worker has now."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [
            child for child in psutil.Process(process.pid).children(recursive=True)
            if "tests.faults.hash_trainer" in " ".join(child.cmdline())
        ]  # fmt: skip
        return bool(found)

    wait_until(look, 20, "a trainer")
    return found[0]


def test_the_bell_brings_a_job_through(fleet: Fleet):
    fleet.start("preflight"), fleet.start("train")
    job_id = fleet.bench.submit()
    fleet.bench.wait(job_id, lambda row: row.status == "succeeded")


def test_a_killed_workers_job_is_claimed_again_after_its_lease(fleet: Fleet):
    fleet.start("preflight"), fleet.start("sweeper")
    first = fleet.start("train", "first")
    data = fleet.bench.dataset()
    quiet = fleet.bench.submit(data, steps=30)
    fleet.bench.wait(quiet, lambda row: row.status == "succeeded")
    job_id = fleet.bench.submit(data, steps=30, step_s=0.1)
    fleet.bench.wait(job_id, lambda row: row.step > 4)
    trainer = trainer_of(first)
    first.signal(signal.SIGKILL)
    first.wait()
    fleet.start("train", "second")
    wait_until(lambda: not trainer.is_running(), 5, "the orphaned trainer to die")
    row = fleet.bench.wait(job_id, lambda row: row.status == "succeeded", 60)
    assert row.attempts == 2 and "job.lease_expired" in fleet.bench.events(job_id)
    assert fleet.bench.adapter(job_id) == fleet.bench.adapter(quiet)


def freeze(worker: Process, bench: Bench) -> None:
    """Stop a worker while it holds no lock: SQLite has one for all writers, and a stopped process keeps it."""
    path = str(bench.context.sessions.engine.url.database)
    for _ in range(50):
        worker.signal(signal.SIGSTOP)
        with contextlib.closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                worker.signal(signal.SIGCONT)
            else:
                return
    raise AssertionError("the worker never let go of the database")


def test_a_stopped_worker_that_wakes_up_after_its_lease_writes_nothing(fleet: Fleet):
    fleet.start("preflight"), fleet.start("sweeper")
    first = fleet.start("train", "first")
    job_id = fleet.bench.submit(steps=30, step_s=0.1)
    fleet.bench.wait(job_id, lambda row: row.step > 2)
    trainer = trainer_of(first)
    freeze(first, fleet.bench)
    trainer.suspend()
    fleet.start("train", "second")
    done = fleet.bench.wait(job_id, lambda row: row.status == "succeeded", 60)
    first.signal(signal.SIGCONT)
    with contextlib.suppress(psutil.NoSuchProcess):  # its worker, awake again, may have ended it already
        trainer.resume()
    wait_until(lambda: not trainer.is_running(), 20, "the fenced trainer to leave")
    first.wait_for("the lease is lost")
    after = fleet.bench.row(job_id)
    assert (after.version, after.seq, after.manifest_key) == (done.version, done.seq, done.manifest_key)


def test_sigterm_drains_and_exits_0(fleet: Fleet):
    fleet.start("preflight")
    worker = fleet.start("train")
    job_id = fleet.bench.submit(steps=100, step_s=0.1)
    fleet.bench.wait(job_id, lambda row: row.step > 2)
    worker.signal(signal.SIGTERM)
    assert worker.wait(20) == 0
    row = fleet.bench.row(job_id)
    assert row.status == "queued" and "job.released" in fleet.bench.events(job_id)


def test_a_drain_asked_for_in_the_database_is_obeyed(fleet: Fleet):
    worker = fleet.start("train")
    with fleet.bench.context.write() as session:
        session.execute(update(WorkerRow).values(desired="drain"))
    assert worker.wait(20) == 0


def test_once_takes_one_job_without_a_broker(fleet: Fleet):
    jobs = [fleet.bench.submit(), fleet.bench.submit()]
    fleet.bench.check()
    worker = fleet.run("train", "--once", broker_url=SecretStr("redis://127.0.0.1:1/0"))
    assert worker.wait(30) == 0
    assert sorted(fleet.bench.row(job).status for job in jobs) == ["queued", "succeeded"]


def test_a_worker_with_an_idle_timeout_takes_what_waits_and_leaves(fleet: Fleet):
    jobs = [fleet.bench.submit(), fleet.bench.submit()]
    fleet.bench.check()
    worker = fleet.run("train", "--idle-timeout", "1.5", broker_url=SecretStr("redis://127.0.0.1:1/0"))
    assert worker.wait(30) == 0
    assert [fleet.bench.row(job).status for job in jobs] == ["succeeded", "succeeded"]


def test_a_lost_bell_is_rung_again_by_the_sweeper(fleet: Fleet):
    job_id = fleet.bench.submit()
    fleet.bench.context.doorbell.close()
    assert celery_app(fleet.bench.context.settings).control.purge() == 1
    fleet.start("preflight"), fleet.start("train"), fleet.start("sweeper")
    fleet.bench.wait(job_id, lambda row: row.status == "succeeded")


def test_a_worker_that_hears_no_bell_looks_for_itself(fleet: Fleet):
    deaf = {"broker_url": SecretStr("redis://127.0.0.1:1/0")}
    job_id = fleet.bench.submit(steps=400, step_s=0.05)
    fleet.bench.check()
    worker = fleet.run("train", **deaf)
    fleet.bench.wait(job_id, lambda row: row.step > 2, LOOK_S + 20)
    worker.signal(signal.SIGTERM)
    assert worker.wait(20) == 0, "what it found is drained as if it had been rung"
    assert fleet.bench.row(job_id).status == "queued" and "job.released" in fleet.bench.events(job_id)


def test_cancel_reaches_a_worker_process(fleet: Fleet):
    fleet.start("preflight")
    worker = fleet.start("train")
    job_id = fleet.bench.submit(steps=500, step_s=0.1)
    fleet.bench.wait(job_id, lambda row: row.step > 2)
    trainer = trainer_of(worker)
    with fleet.bench.context.write() as session:
        lifecycle.request_cancel(session, TENANT, job_id)
    fleet.bench.wait(job_id, lambda row: row.status == "cancelled", 20)
    wait_until(lambda: not trainer.is_running(), 5, "the trainer to be gone")
