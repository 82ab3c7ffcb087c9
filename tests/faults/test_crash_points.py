"""A kill at every step of claim, checkpoint, publish, cancel, pause and the rest: each once, and none costs a job."""

from __future__ import annotations

import http.client
import signal
import uuid

import psutil
import pytest
from pydantic import SecretStr

from common import keys
from common.embedded.ports import free_ports
from common.jobs import lifecycle
from tests.faults.judged import TENANT, Judged
from tests.processes import Process, Processes

VERB = "common.jobs.lifecycle:{}"
ALL = ("before", "after", "committed")
CLAIM = [f"{when} {VERB.format('claim')}" for when in ALL]
ATTEMPT = [
    "before worker.specs:fetch_files",
    "after worker.specs:write",
    "before worker.child:Child.__init__",
    "after worker.child:Child.__init__",
    *(f"{when} {VERB.format('advance')}" for when in ALL),
    *(f"{when} {VERB.format('renew')}" for when in ALL),
]
CHECKPOINT = [
    "before worker.publish:checkpoint 2",
    "before common.storage.store:Store.put_file 3",  # the first file of the second checkpoint
    "after common.storage.store:Store.put_file 3",
    "before common.storage.store:Store.put_file 4",  # its manifest
    "after worker.publish:checkpoint 2",
    *(f"{when} {VERB.format('checkpointed')} 2" for when in ALL),
]
PUBLISH = [
    "before worker.publish:artifacts",
    "after worker.publish:archive_folder",
    "after common.storage.store:Store.put_file 7",  # the first file of the adapter, after three checkpoints
    "before common.storage.store:Store.put_bytes",  # the manifest
    "after common.storage.store:Store.put_bytes",
    *(f"{when} {VERB.format('publish')}" for when in ALL),
]


def crash(judged: Judged, processes: Processes, point: str, module: str, *arguments: str, **changes: object) -> Process:
    """Start a module that will die at `point`."""
    # No broker: `--once` looks at the database itself.
    away = {"broker_url": SecretStr("redis://127.0.0.1:1/0")}
    settings = judged.bench.context.settings.model_copy(update=away | changes)
    return processes.start(
        f"crashing-{uuid.uuid4().hex}", ["tests.faults.crashing", point, module, *arguments], settings
    )


def assert_it_died_there(process: Process) -> None:
    code = process.wait(60)
    assert code == -signal.SIGKILL, f"it did not come to this point, and ended with {code}:\n{process.said()[-2000:]}"


def assert_whole(judged: Judged) -> None:
    """The checker finds nothing, and no trainer is left."""
    verdict = judged.verdict()
    assert verdict.clean, verdict
    words = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    work_dir = str(judged.bench.context.settings.work_dir)
    assert not [line for line in words if "hash_trainer" in line and work_dir in line]


@pytest.mark.parametrize("point", [*CLAIM, *ATTEMPT, *CHECKPOINT, *PUBLISH])
def test_a_worker_that_dies(judged: Judged, processes: Processes, point: str):
    # Slow enough for a renewal, which comes every eighth of a lease, where that is the point.
    job_id = judged.submit(steps=6, step_s=0.3 if "renew" in point else 0.02)
    judged.bench.check()
    assert_it_died_there(crash(judged, processes, point, "worker", "train", "--once"))
    judged.expire(job_id)
    judged.finish()
    assert judged.bench.row(job_id).status == "succeeded"
    assert_whole(judged)


@pytest.mark.parametrize("when", ALL)
@pytest.mark.parametrize("wish", ["cancel", "pause", "drain"])
def test_a_worker_that_dies_while_it_obeys(judged: Judged, processes: Processes, wish: str, when: str):
    job_id = judged.submit(steps=100, step_s=0.05)
    judged.bench.check()
    process = crash(judged, processes, f"{when} {VERB.format('release')}", "worker", "train", "--once")
    judged.bench.wait(job_id, lambda row: row.step > 2)
    if wish == "drain":
        process.signal(signal.SIGTERM)
    else:
        with judged.bench.context.write() as session:
            {"cancel": lifecycle.request_cancel, "pause": lifecycle.pause}[wish](session, TENANT, job_id)
    assert_it_died_there(process)
    judged.expire(job_id)
    row = judged.bench.row(job_id)
    assert row.status == {"cancel": "cancelled", "pause": "paused", "drain": "queued"}[wish]
    if wish == "pause":
        with judged.bench.context.write() as session:
            lifecycle.resume(session, TENANT, job_id)
    judged.finish()
    assert judged.bench.row(job_id).status == ("cancelled" if wish == "cancel" else "succeeded")
    assert_whole(judged)


@pytest.mark.parametrize("when", ALL)
@pytest.mark.parametrize(("verb", "fault"), [("fail", "diverge"), ("fault", "device")])
def test_a_worker_that_dies_while_it_tells_of_a_failure(
    judged: Judged, processes: Processes, verb: str, fault: str, when: str
):
    code = "diverged" if verb == "fail" else None
    job_id = judged.submit(code=code, fault=fault, fault_at=4, fault_attempts=1000 if code else 1)
    judged.bench.check()
    assert_it_died_there(crash(judged, processes, f"{when} {VERB.format(verb)}", "worker", "train", "--once"))
    judged.expire(job_id)
    judged.finish()
    assert judged.bench.row(job_id).status == ("failed" if code else "succeeded")
    assert_whole(judged)


@pytest.mark.parametrize("when", ALL)
@pytest.mark.parametrize("verb", ["claim_preflight", "accept", "reject"])
def test_a_checking_worker_that_dies(judged: Judged, processes: Processes, verb: str, when: str):
    bad = {"data": '{"text": \n', "code": "bad_row"} if verb == "reject" else {}
    job_id = judged.submit(**bad)  # type: ignore[arg-type]
    assert_it_died_there(crash(judged, processes, f"{when} {VERB.format(verb)}", "worker", "preflight", "--once"))
    judged.expire(job_id)
    judged.finish()
    assert judged.bench.row(job_id).status == ("failed" if bad else "succeeded")
    assert_whole(judged)


@pytest.mark.parametrize("when", ALL)
def test_a_sweeper_that_dies(judged: Judged, processes: Processes, when: str):
    job_id = judged.submit()
    judged.bench.check()
    with judged.bench.context.write() as session:
        assert lifecycle.claim(session, "gone", 0.1) is not None
    assert_it_died_there(crash(judged, processes, f"{when} {VERB.format('expire')}", "worker", "sweeper"))
    judged.expire(job_id)
    judged.finish()
    assert judged.bench.row(job_id).status == "succeeded"
    assert_whole(judged)


class Api:
    """An API that dies at a point, and one that does not."""

    def __init__(self, judged: Judged, processes: Processes):
        self._judged, self._processes = judged, processes
        with judged.bench.context.write() as session:
            _, self._key = keys.create(session, name="test", tenant=TENANT, admin=True)

    def start(self, point: str) -> Process:
        self._port = free_ports(1)[0]
        process = crash(self._judged, self._processes, point, "api", port=self._port)
        process.wait_for("Uvicorn running")
        return process

    def post(self, path: str, body: bytes = b"", **headers: str) -> int:
        """Return the status, or 0 if nobody answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"} | headers
            connection.request("POST", path, body, headers)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()


NEVER = f"before {VERB.format('claim')}"


@pytest.mark.parametrize("when", ALL)
@pytest.mark.parametrize("verb", ["request_cancel", "pause", "resume"])
def test_an_api_that_dies_while_it_takes_a_wish(judged: Judged, processes: Processes, verb: str, when: str):
    job_id = judged.submit()
    judged.bench.check()
    if verb == "resume":
        with judged.bench.context.write() as session:
            lifecycle.pause(session, TENANT, job_id)
    before, api = judged.bench.row(job_id).status, Api(judged, processes)
    word = verb.removeprefix("request_")
    process = api.start(f"{when} {VERB.format(verb)}")
    assert api.post(f"/jobs/{job_id}/{word}") == 0
    assert_it_died_there(process)
    after = {"cancel": "cancelled", "pause": "paused", "resume": "queued"}[word]
    assert judged.bench.row(job_id).status == (after if when == "committed" else before)
    if (verb == "pause" and when == "committed") or (verb == "resume" and when != "committed"):
        with judged.bench.context.write() as session:
            lifecycle.resume(session, TENANT, job_id)
    judged.finish()
    cancelled = verb == "request_cancel" and when == "committed"
    assert judged.bench.row(job_id).status == ("cancelled" if cancelled else "succeeded")
    assert_whole(judged)


@pytest.mark.parametrize("when", ALL)
def test_an_api_that_dies_while_it_accepts_a_job(judged: Judged, processes: Processes, when: str):
    api, key = Api(judged, processes), uuid.uuid4().hex
    body = b'{"model": "tiny", "dataset": "%s", "hyperparameters": {"max_steps": 6}}' % judged.bench.dataset().encode()
    process = api.start(f"{when} {VERB.format('submit')}")
    assert api.post("/jobs", body, **{"Idempotency-Key": key}) == 0
    assert_it_died_there(process)
    again = api.start(NEVER)
    assert api.post("/jobs", body, **{"Idempotency-Key": key}) == 201
    again.end()
    (job_id,) = judged.checker().rows
    judged.accepted(job_id, 6)
    judged.finish()
    assert judged.bench.row(job_id).status == "succeeded"
    assert_whole(judged)
