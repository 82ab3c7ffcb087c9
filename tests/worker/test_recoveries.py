"""What the fault runs taught: each of these once cost a lease, a worker or a job."""

from __future__ import annotations

import errno
import fcntl
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from common.db.rows import WorkerRow
from common.embedded.ports import free_ports
from common.errors import InfraError
from common.jobs import lifecycle, queries
from common.storage.store import Store
from tests.faults.proxy import Proxy
from tests.processes import wait_until
from tests.servers import S3
from tests.worker.conftest import TENANT, Bench
from tests.worker.peers import Answer, serve
from worker import publish, specs
from worker.sweeper import Sweeper
from worker.workplace import Workplace

AWAY = OperationalError("select 1", {}, Exception("server closed the connection unexpectedly"))


class LostAnswers:
    """Loses the answer to the first commit of each verb: it was made, and the worker does not hear of it."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, *verbs: str):
        self.lost: list[str] = []
        self._write = bench.context.sessions.write
        for verb in verbs:
            monkeypatch.setattr(lifecycle, verb, self._marked(verb, getattr(lifecycle, verb)))
        monkeypatch.setattr(bench.context.sessions, "write", self.write)

    def _marked(self, name: str, verb: Callable) -> Callable:
        def marked(session: Session, *arguments: object, **options: object) -> object:
            session.info["verb"] = name
            return verb(session, *arguments, **options)

        return marked

    @contextmanager
    def write(self) -> Iterator[Session]:
        with self._write() as session:
            yield session
        verb = session.info.get("verb")
        if verb is not None and verb not in self.lost:
            self.lost.append(verb)
            raise AWAY


def test_a_lost_answer_to_a_commit_neither_doubles_nor_hangs(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    quiet = bench.submit(data := bench.dataset(), steps=10)
    bench.check(), bench.train()
    answers = LostAnswers(bench, monkeypatch, "accept", "advance", "checkpointed", "publish")
    job_id = bench.submit(data, steps=10)
    bench.check()
    _, thread = bench.start()
    thread.join(90)
    assert not thread.is_alive(), "the attempt repeats a write for ever"
    assert answers.lost == ["accept", "advance", "checkpointed", "publish"]
    row = bench.row(job_id)
    assert (row.status, row.attempts) == ("succeeded", 1) and bench.adapter(job_id) == bench.adapter(quiet)
    with bench.context.read() as session:
        steps = [found.step for found in queries.checkpoints(session, job_id)]
        shown = [point.step for point in queries.metrics(session, job_id).data]
    assert sorted(set(steps)) == sorted(steps) and shown == list(range(1, 11))


def test_a_database_that_is_away_when_an_attempt_begins_costs_no_lease(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    job_id = bench.submit()
    bench.check()
    _fail_once(monkeypatch, specs, "fetch_files", AWAY)
    bench.train()
    assert bench.row(job_id).status == "succeeded" and "job.interrupted" in bench.events(job_id)


@pytest.mark.parametrize("error", [AWAY, PoolTimeout("no connection"), OSError(errno.ENOSPC, "no space left")])
def test_a_check_that_is_disturbed_is_made_again_without_waiting_for_its_lease(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    job_id = bench.submit()
    _fail_once(monkeypatch, specs, "fetch_files", error)
    bench.check()
    assert bench.row(job_id).status == "queued" and "job.postponed" in bench.events(job_id)


def test_a_checking_worker_that_leaves_gives_its_job_back(bench: Bench):
    job_id = bench.submit(check="hang")
    supervisor, thread = bench.start(bench.supervisor("preflight"))
    bench.wait(job_id, lambda row: row.worker_id is not None)
    supervisor.draining.set()
    thread.join(20)
    row = bench.row(job_id)
    assert (row.status, row.worker_id, row.lease_expires_at) == ("validating", None, None)


def test_whoever_waits_for_a_check_sees_how_far_it_is(bench: Bench):
    job_id = bench.submit(check="hang")
    supervisor, thread = bench.start(bench.supervisor("preflight"))
    began = bench.wait(job_id, lambda row: row.checked is not None)
    told = queries.shown(began).checked
    assert told is not None and (told.param, told.rows, told.bytes, told.total_bytes) == ("dataset", 1, 14, 28)
    supervisor.draining.set()
    thread.join(20)
    row = bench.row(job_id)
    assert row.version > began.version and queries.shown(row).checked is None, "nobody checks it now"


def test_a_trainer_whose_helper_outlives_it_is_mourned_at_once(bench: Bench):
    job_id = bench.submit(fault="orphan", fault_at=3, fault_attempts=1)
    bench.check()
    _, thread = bench.start()
    thread.join(20)
    assert not thread.is_alive(), "the worker waits for the helper"
    assert bench.row(job_id).status == "succeeded"
    assert not [child for child in psutil.Process().children(recursive=True) if "sleep(300)" in child.cmdline()[-1]]


@pytest.fixture
def store_proxy(bench: Bench, s3: S3) -> Iterator[Proxy]:
    """A proxy between this installation and its store."""
    proxy = Proxy(("127.0.0.1", free_ports(1)[0]), ("127.0.0.1", int(s3.endpoint_url.rpartition(":")[2])))
    proxy.start()
    settings = bench.context.settings.model_copy(
        update={"s3_endpoint_url": f"http://127.0.0.1:{proxy.listen[1]}"}  # type: ignore[index]
    )
    object.__setattr__(bench.context, "store", Store(settings))
    yield proxy
    proxy.close()


@pytest.mark.parametrize("upload", ["checkpoint", "artifacts"])
def test_a_job_is_cancelled_although_the_store_does_not_answer(
    bench: Bench, store_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, upload: str
):
    real, stuck = getattr(publish, upload), threading.Event()

    def cut_off(*arguments: object) -> object:
        store_proxy.half_open()
        stuck.set()
        return real(*arguments)

    monkeypatch.setattr(publish, upload, cut_off)
    job_id = bench.submit(steps=3)
    bench.check()
    _, thread = bench.start()
    assert stuck.wait(20)
    bench.wait(job_id, lambda row: row.step == 3)
    with bench.context.write() as session:
        lifecycle.request_cancel(session, TENANT, job_id)
    bench.wait(job_id, lambda row: row.status == "cancelled", 20)
    store_proxy.heal()
    thread.join(30)
    assert not thread.is_alive()


# botocore 1.44 leaves the socket of a body that was cut off to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_transfer_that_breaks_again_and_again_is_the_stores_fault(bench: Bench, tmp_path: Path):
    def cut(path: str, headers: dict[str, str]) -> Answer:
        return Answer(b"too short", headers={"Content-Length": "100000"})

    with serve(cut) as peer:
        address = f"http://127.0.0.1:{peer.server_address[1]}"
        store = Store(bench.context.settings.model_copy(update={"s3_endpoint_url": address}))
        with pytest.raises(InfraError):
            store.get_file("key", tmp_path / "file")
        store.close()
    gc.collect()


def test_a_worker_that_finds_no_free_connection_goes_on_reporting(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worker.supervisor.BEAT_S", 0.05)
    write, failed = bench.context.sessions.write, threading.Event()

    def refuse() -> None:
        monkeypatch.setattr(bench.context.sessions, "write", write)
        failed.set()
        raise PoolTimeout("no connection")

    supervisor = bench.supervisor()
    monkeypatch.setattr(bench.context.sessions, "write", refuse)
    supervisor.start()
    assert failed.wait(10)
    wait_until(lambda: _heard(bench, supervisor.worker_id), 10, "the next report")


def _heard(bench: Bench, worker_id: str) -> bool:
    with bench.context.read() as session:
        return session.get(WorkerRow, worker_id) is not None


def test_two_workers_that_start_together_keep_their_folders(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    real, others = fcntl.flock, []

    def interrupted(file: object, how: int) -> None:
        if how == fcntl.LOCK_EX and not others:
            # Here the first has made its folder and has not locked it yet: it looks like a dead worker's.
            others.append(None)
            others[0] = Workplace(bench.context.settings)
        real(file, how)

    monkeypatch.setattr("worker.workplace.fcntl.flock", interrupted)
    first = Workplace(bench.context.settings)
    assert first.has_room() and others[0].has_room()
    third = Workplace(bench.context.settings)
    assert first.folder.is_dir() and others[0].folder.is_dir(), "a living worker's folder was cleared"
    for workplace in (first, *others, third):
        workplace.close()


def test_many_workers_clear_the_folders_of_the_dead_at_once(bench: Bench):
    root = bench.context.settings.work_dir / "jobs"
    for number in range(60):
        (root / f"dead-{number}" / "job").mkdir(parents=True)
        (root / f"dead-{number}" / ".lock").touch()
    start, made = threading.Barrier(6), []

    def arrive() -> None:
        start.wait()
        made.append(Workplace(bench.context.settings))

    threads = [threading.Thread(target=arrive) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert len(made) == 6, "a worker could not start"
    assert not list(root.glob("dead-*"))
    for workplace in made:
        workplace.close()


def test_a_full_disk_before_the_attempt_does_not_end_the_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    job_id = bench.submit()
    bench.check()
    supervisor = bench.supervisor()
    _fail_once(monkeypatch, Workplace, "job", OSError(errno.ENOSPC, "no space left"))
    assert supervisor.work_off() == 0
    with bench.context.write() as session:
        session.execute(lifecycle.guards.jobs.update().values(lease_expires_at=0.0))
    Sweeper(bench.context).sweep()
    assert supervisor.work_off() == 1 and bench.row(job_id).status == "succeeded"


@pytest.mark.parametrize(("kind", "code"), [("preflight", "check_broke"), ("train", "crash_loop")])
def test_what_breaks_every_attempt_ends_the_job_with_a_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str, code: str
):
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("an error of this program")

    job_id = bench.submit()
    if kind == "train":
        bench.check()
    monkeypatch.setattr(specs, "write", broken)
    bench.supervisor(kind).work_off()
    row = bench.row(job_id)
    assert row.status == "failed" and row.error["code"] == code and "KeyError" in row.error["message"]


def _fail_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: Exception) -> None:
    real = getattr(owner, name)

    def fail(*arguments: object, **options: object) -> None:
        monkeypatch.setattr(owner, name, real)
        raise error

    monkeypatch.setattr(owner, name, fail)
