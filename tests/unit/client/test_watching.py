"""Following a job: nothing lost, nothing twice, whatever breaks."""

from __future__ import annotations

import httpx2
import pytest

from common.client import Missing, Tunery, UnexpectedAnswer
from common.client.errors import CannotConnect, connection_error
from common.client.jobs import Job
from common.client.retries import Retries
from common.client.watching import Cursor, Patience
from common.schemas.jobs import Event, Metric
from tests.unit.client.conftest import a_job, a_metric, an_event
from tests.unit.client.peer import Peer, hangs_up, problem, raw, says, stream

ENDED = ("job", None, a_job(status="succeeded"))


def test_a_watch_ends_with_the_ended_job(peer: Peer, client: Tunery):
    peer.on(
        "GET",
        "/jobs/job_1/events",
        stream(
            ("job", None, a_job()),
            ("event", 1, an_event(1)),
            ("metric", 2, a_metric(2, 10, loss=2.5)),
            ENDED,
        ),
    )
    updates = list(client.jobs.watch("job_1"))
    assert [type(update) for update in updates] == [Job, Event, Metric, Job]
    assert updates[2].values == {"loss": 2.5}
    assert updates[3].status == "succeeded"
    assert peer.requests[0].headers["accept"] == "text/event-stream"
    assert "last-event-id" not in peer.requests[0].headers


def test_a_broken_stream_goes_on_behind_what_was_seen(peer: Peer, client: Tunery):
    peer.on(
        "GET",
        "/jobs/job_1/events",
        stream(("event", 1, an_event(1)), ("event", 4, an_event(4))),
        hangs_up,
        problem(503, "infra"),
        # A server that repeats, and one that says what this client does not know.
        stream(("event", 4, an_event(4)), ("event", 7, an_event(7)), ("novelty", 8, {"x": 1}), ENDED),
    )
    updates = list(client.jobs.watch("job_1"))
    assert [update.id for update in updates] == [1, 4, 7, "job_1"]
    assert [seen.headers.get("last-event-id") for seen in peer.requests] == [None, "4", "4", "4"]


def test_what_waiting_does_not_mend_ends_the_watch(peer: Peer, client: Tunery):
    with pytest.raises(Missing):
        list(client.jobs.watch("job_2"))
    peer.on("GET", "/jobs/job_1/events", says({"data": []}))
    with pytest.raises(UnexpectedAnswer, match="no event stream"):
        list(client.jobs.watch("job_1"))
    peer.on("GET", "/jobs/job_3/events", raw(b"event: job\ndata: {oops\n\n", content_type="text/event-stream"))
    with pytest.raises(UnexpectedAnswer, match="not JSON"):
        list(client.jobs.watch("job_3"))
    assert len(peer.requests) == 3


def test_a_server_may_be_away_for_a_while_but_not_for_ever():
    now = [0.0]
    cursor = Cursor("http://x", patience_s=60, retries=Retries(first_s=1, longest_s=5), clock=lambda: now[0])
    for second in (0, 30, 60):
        now[0] = second
        assert 0 < cursor.pause_s(httpx2.ConnectError("refused")) <= 5
    now[0] = 61
    with pytest.raises(CannotConnect, match="refused"):
        cursor.pause_s(httpx2.ConnectError("refused"))
    # Each sign of life starts the patience anew; a stream that merely ends is no failure.
    cursor.take(
        httpx2.ServerSentEvent(
            "event",
            '{"id": 1, "at": "2026-11-01T10:00:00Z", "name": "n", "level": "info", "message": "m", "data": {}}',
            "1",
        ),
        Job,
    )
    now[0] = 120
    assert cursor.pause_s(connection_error("http://x", httpx2.ReadError("reset"))) <= 1
    now[0] = 9999
    assert cursor.pause_s(None) <= 2


def test_wait_polls_until_the_job_has_ended(peer: Peer, client: Tunery):
    client._transport.sleep = lambda seconds: None
    peer.on("GET", "/jobs/job_1", says(a_job()), hangs_up, says(a_job(status="paused")), says(a_job(status="failed")))
    assert client.jobs.wait("job_1").status == "failed"
    assert len(peer.requests) == 4
    assert all(seen.query["wait"] == ["20"] for seen in peer.requests)


def test_wait_has_an_end_of_its_own(peer: Peer, client: Tunery):
    peer.on("GET", "/jobs/job_1", says(a_job()))
    with pytest.raises(TimeoutError, match=r"job_1 is still running after 0\.05 s"):
        client.jobs.wait("job_1", timeout_s=0.05)


def test_patience_counts_the_time_and_spares_the_server():
    now = [100.0]
    patience = Patience(10, clock=lambda: now[0])
    job = Job.model_construct(id="job_1", status="running")
    assert patience.left_s() == 10
    now[0] = 100.25
    assert patience.pause_s(job) == 0.75
    now[0] = 109.5
    assert patience.left_s() == 0.5
    assert patience.pause_s(job) == 0.5
    now[0] = 130
    with pytest.raises(TimeoutError):
        patience.pause_s(job)


def test_a_job_knows_the_way_back(peer: Peer, client: Tunery):
    peer.on("GET", "/jobs/job_1", says(a_job()), says(a_job(status="succeeded")))
    peer.on(
        "GET",
        "/jobs/job_1/events",
        says({"data": [an_event(1)], "has_more": True, "next": 1}),
        says({"data": [an_event(2)], "has_more": False, "next": 2}),
    )
    peer.on(
        "GET",
        "/jobs/job_1/metrics",
        says(
            {
                "data": [
                    a_metric(1, 1, loss=3.0),
                    a_metric(2, 2, loss=2.0, grad_norm=0.5),
                    a_metric(3, 2, "eval", eval_loss=9.0),
                ],
                "has_more": False,
                "next": 3,
            }
        ),
    )
    peer.on("POST", "/jobs/job_1/pause", says(a_job(desired="pause")))
    peer.on("DELETE", "/jobs/job_1", raw(b"", 204))
    made = {"attempt": 1, "bytes": 9, "manifest_sha256": "0" * 64, "created_at": "2026-11-01T10:00:00Z"}
    peer.on("GET", "/jobs/job_1/checkpoints", says({"data": [made | {"step": 20}, made | {"step": 10}]}))
    line = {"name": "lm_head", "class": "Linear", "dtype": "bfloat16", "bits": 16, "parameters": 4, "trained": 0}
    report = {"compute_dtype": "bfloat16", "adapter_dtype": "bfloat16", "parameters": {}, "bytes": {}}
    peer.on("GET", "/jobs/job_1/precision", says(report | {"modules": [line | {"status": "frozen"}]}))
    job = client.jobs.get("job_1")
    assert [(module.kind, module.status) for module in job.precision().modules] == [("Linear", "frozen")]
    assert [checkpoint.step for checkpoint in job.checkpoints()] == [20, 10]
    assert job.refresh().status == "succeeded"
    assert [event.id for event in job.events()] == [1, 2]
    assert peer.requests[-1].query["after"] == ["1"]
    assert job.metrics() == {"step": [1, 2], "loss": [3.0, 2.0], "grad_norm": [None, 0.5]}
    assert job.metrics("eval") == {"step": [2], "eval_loss": [9.0]}
    assert job.pause().desired == "pause"
    job.delete()
    assert peer.requests[-1].method == "DELETE"
