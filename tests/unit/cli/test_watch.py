"""`watch` and `submit --watch`: lines as they come, and the exit code that is the job's result."""

from __future__ import annotations

import json
import re

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


@pytest.mark.parametrize("columns", [None, 80, 120])
def test_watch_tells_bad_rows_once_as_the_table_of_show(peer: Peer, tunery, monkeypatch, columns):
    told = [(2, "messages[1]", "role 'asistant' is not known"), (3, None, "broken JSON"), (7, "messages", "is empty")]
    names = ("row", "field", "message")
    problems = [{"param": "dataset", "code": "bad", **dict(zip(names, row, strict=True))} for row in told]
    message = "\n".join(f"dataset: row {row}: {what}" for row, _, what in told)
    error = {"code": "bad_rows", "message": message, "hint": "mend them", "problems": problems, "num_problems": 3}
    failed, event = a_job(status="failed", error=error), an_event(1, "job.failed") | {"message": message}
    peer.on("GET", "/jobs/job_1", says(failed))
    peer.on("GET", "/jobs/job_1/events", stream(("event", 1, event), ("job", None, failed)))
    if columns:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(columns))

    def plain(text: str) -> list[str]:
        return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").splitlines()]

    done, shown = tunery("watch", "job_1"), plain(tunery("show", "job_1").stdout)
    table = shown[next(place for place, line in enumerate(shown) if "WHAT IS WRONG" in line) :]
    assert len(table) == 4
    assert plain(done.stderr) == ["error: 3 bad rows in dataset", *table, "hint: mend them"]
    lines = plain(done.stdout)
    first = next(place for place, line in enumerate(lines) if "job.failed" in line)
    said = " ".join(line[34:] for line in lines[first : first + (2 if columns == 80 else 1)])
    assert said == "dataset: row 2: role 'asistant' is not known, and more"
    assert "broken JSON" not in done.stdout and "is empty" not in done.stdout


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
