"""`cancel` for many jobs at once."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from tests.unit.client.peer import Peer, says


def test_many_jobs_are_cancelled(peer: Peer, tunery):
    gone = {"id": "job_1", "result": "cancelled", "status": "cancelled"}
    runs = {"id": "job_2", "result": "cancelling", "status": "running"}
    first = {"data": [gone], "dry_run": False, "has_more": True, "next": "job_1"}
    peer.on("POST", "/jobs/cancel", says(first), says(first | {"data": [runs], "has_more": False, "next": None}))
    done = tunery("cancel", "--status", "queued", "--status", "running", "--metadata", "a=b", "--created-after", "-2h")
    assert done.stdout.splitlines() == ["job_1: cancelled", "job_2: cancelling"]
    assert done.stderr == "1 cancelled, 1 cancelling\n"
    bodies = [json.loads(seen.body) for seen in peer.requests]
    since = datetime.fromisoformat(bodies[0]["filter"].pop("created_after"))
    assert abs((datetime.now(UTC) - since).total_seconds() - 7200) < 60
    assert bodies[0] == {"dry_run": False, "filter": {"status": ["queued", "running"], "metadata": {"a": "b"}}}
    assert bodies[1]["after"] == "job_1"
    for neither_nor in ((), ("job_1", "--status", "queued")):
        assert tunery("cancel", *neither_nor).exit_code == 2
    assert len(peer.requests) == 2


def test_a_dry_run_says_what_would_be(peer: Peer, tunery):
    outcomes = [("cancelled", "queued"), ("cancelling", "running"), ("ended", "failed"), ("not_found", None)]
    data = [{"id": f"job_{n}", "result": result, "status": status} for n, (result, status) in enumerate(outcomes)]
    peer.on("POST", "/jobs/cancel", says({"data": data, "dry_run": True, "has_more": False, "next": None}))
    done = tunery("cancel", "job_0", "job_1", "job_2", "job_3", "--dry-run")
    assert "job_0: would be cancelled" in done.stdout and "job_1: would be cancelling" in done.stdout
    assert "job_2: has ended" in done.stdout and "nothing was done" in done.stderr
    assert json.loads(peer.requests[0].body) == {"dry_run": True, "ids": ["job_0", "job_1", "job_2", "job_3"]}
