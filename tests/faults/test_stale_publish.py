"""The last moment at which two attempts could both publish: a worker frozen there wakes up when another has done it."""

from __future__ import annotations

import signal

import psutil
import pytest

from common.jobs import queries
from tests.faults.judged import TENANT, Judged
from tests.processes import Process, Processes, wait_until
from worker.sweeper import Sweeper

POINTS = {
    # Everything lies in the store, the manifest too; nothing has been said to the database yet.
    "before the transaction": "freeze-before common.jobs.lifecycle:publish",
    # The row says `succeeded`, in a transaction that is not committed.
    "before the commit": "freeze-after common.jobs.lifecycle:publish",
}


@pytest.fixture(params=[("sqlite", "before the transaction"), *(("postgres", point) for point in POINTS)], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def bench_database_url(case: tuple[str, str], request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{case[0]}_url"))


def frozen(process: Process) -> bool:
    assert process.running, process.said()[-2000:]
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def test_the_attempt_that_wakes_up_is_refused(judged: Judged, processes: Processes, case: tuple[str, str]):
    bench = judged.bench
    job_id = judged.submit()
    bench.check()
    settings = bench.context.settings.model_copy(update={"lease_s": 2.0})
    first = processes.start("first", ["tests.faults.crashing", POINTS[case[1]], "worker", "train", "--once"], settings)
    wait_until(lambda: frozen(first), 60, "the first worker to come to its last moment")
    stale = bench.row(job_id)
    assert stale.status == "running" and stale.manifest_key is None

    # Its lease ends by itself, and a transaction that it has left open by the database's own patience.
    sweeper = Sweeper(bench.context)

    def given_back() -> bool:
        sweeper.sweep()
        return bench.row(job_id).status == "queued"

    wait_until(given_back, 40, "the job to be given to somebody else")
    bench.train()
    done = bench.row(job_id)
    assert done.status == "succeeded" and done.epoch == stale.epoch + 1

    first.signal(signal.SIGCONT)
    first.wait(60)
    assert "the lease is lost" in first.said()
    after = bench.row(job_id)
    assert (after.version, after.seq, after.manifest_key) == (done.version, done.seq, done.manifest_key)
    prefix = f"{TENANT}/{job_id}/a{stale.epoch}/"
    keys = {item.key for item in bench.context.store.objects(prefix)}
    assert f"{prefix}manifest.json" in keys, "the stale attempt had not uploaded everything: the test came too early"
    with bench.context.read() as session:
        assert not keys & {artifact.key for artifact in queries.artifacts(session, job_id)}
    assert judged.verdict().clean, judged.verdict()
