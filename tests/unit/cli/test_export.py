"""`export`: the job that merges, whether it is new, done already or watched."""

from __future__ import annotations

import json

from tests.unit.client.conftest import a_job
from tests.unit.client.peer import Peer, says, stream


def test_export(peer: Peer, tunery):
    made = a_job(id="job_2", source_job="job_1", status="queued", stage=None, export=["merged", "merged_4bit"])
    peer.on("POST", "/jobs/job_1/export", says(made, 201))
    done = tunery("export", "job_1", "--as", "merged", "--as", "merged_4bit", "--priority", "5")
    assert done.exit_code == 0 and "job_2: merging job_1 as merged, merged_4bit" in done.stdout
    assert "tunery watch job_2" in done.stdout
    asked = json.loads(peer.asked("POST", "/jobs/job_1/export")[0].body)
    assert asked == {"export": ["merged", "merged_4bit"], "priority": 5}


def test_export_of_what_is_there_already(peer: Peer, tunery):
    peer.on("POST", "/jobs/job_1/export", says(a_job(id="job_2", source_job="job_1", status="succeeded"), 200))
    done = tunery("export", "job_1")
    assert done.exit_code == 0 and "made already, by job_2: `tunery download job_1` fetches it" in done.stdout
    assert json.loads(peer.asked("POST", "/jobs/job_1/export")[0].body)["export"] == ["merged"]


def test_export_that_is_watched(peer: Peer, tunery):
    ended = a_job(id="job_2", source_job="job_1", status="succeeded", stage=None)
    peer.on("POST", "/jobs/job_1/export", says(a_job(id="job_2", source_job="job_1", status="queued", stage=None), 201))
    peer.on("GET", "/jobs/job_2", says(ended))
    peer.on("GET", "/jobs/job_2/events", stream(("job", None, ended)))
    done = tunery("export", "job_1", "--watch")
    assert done.exit_code == 0 and "succeeded: `tunery download job_1` fetches what it made" in done.stdout
