"""`watch` and `submit --watch`: lines as they come, and the exit code that is the job's result."""

from __future__ import annotations

import json

import pytest

from tests.unit.client.conftest import a_job, a_metric, an_event
from tests.unit.client.peer import Peer, says, stream


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 3)])
def test_the_exit_code_of_watch_is_the_jobs_result(peer: Peer, tunery, status, code):
    error = {"code": "diverged", "message": "the loss is NaN", "hint": "lower it"} if status == "failed" else None
    peer.on("GET", "/jobs/job_1", says(a_job()))
    peer.on(
        "GET",
        "/jobs/job_1/events",
        stream(
            ("job", None, a_job()),
            ("event", 1, an_event(1)),
            ("metric", 2, a_metric(2, 4, loss=1.25)),
            ("job", None, a_job(status=status, error=error)),
        ),
    )
    done = tunery("watch", "job_1")
    assert done.exit_code == code
    assert "train step 4/10  loss 1.25" in done.stdout
    assert ("the loss is NaN" in done.stderr and "hint: lower it" in done.stderr) == (status == "failed")
    assert ("tunery download job_1" in done.stdout) == (status == "succeeded")


def test_each_bad_row_has_its_line(peer: Peer, tunery):
    error = {
        "code": "bad_rows",
        "message": "dataset: row 1: is\x1b empty\ndataset: row 3: is empty",
        "hint": "fill it in",
    }
    peer.on("GET", "/jobs/job_1", says(a_job()))
    peer.on("GET", "/jobs/job_1/events", stream(("job", None, a_job(status="failed", error=error))))
    lines = tunery("watch", "job_1").stderr.splitlines()
    assert lines[:3] == ["error: dataset: row 1: is  empty", "dataset: row 3: is empty", "hint: fill it in"]


def test_submit_and_watch_as_json(peer: Peer, tunery):
    peer.on("POST", "/jobs", says(a_job(), 201))
    peer.on("GET", "/jobs/job_1", says(a_job()))
    peer.on("GET", "/jobs/job_1/events", stream(("event", 1, an_event(1)), ("job", None, a_job(status="succeeded"))))
    done = tunery("submit", "hf://x/y", "-m", "base", "--watch", "-o", "json")
    assert done.exit_code == 0
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == ["event", "job"]


def test_ctrl_c_detaches(peer: Peer, tunery, monkeypatch):
    from common.client import jobs

    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(jobs.Jobs, "watch", interrupted)
    peer.on("GET", "/jobs/job_1", says(a_job()))
    done = tunery("watch", "job_1")
    assert done.exit_code == 130
    told = ["detached: job_1 goes on", "come back: tunery watch job_1", "stop it:   tunery cancel job_1"]
    assert done.stderr.splitlines() == told
    assert [seen.method for seen in peer.requests] == ["GET"]
