"""Bad rows of a dataset from the check of a preflight worker to the one who has to mend them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from common.client import Tunery
from tests.api.conftest import SPEC, Api
from tests.worker.trainer.tiny import chat_rows
from worker.supervisor import Supervisor


@pytest.fixture
def api(start: Callable[..., Api], sqlite_url: str, tmp_path: Path) -> Api:
    return start(sqlite_url, work_dir=tmp_path / "work")


def test_they_are_told_by_the_line_of_the_file(api: Api, client: httpx2.Client, worker: Supervisor):
    good, bad = json.dumps(chat_rows(1)[0]), json.dumps({"messages": [{"role": "user", "content": 1}]})
    # Blank lines count: an editor goes to the number that is told.
    rows = f"{good}\n\n\n{bad}\n{good}\n \n{{oops\n" + '{"messages": []}\n' * 120
    dataset = client.post("/datasets", files={"file": ("train.jsonl", rows)}).json()["id"]
    asked = SPEC | {"model": "llama", "dataset": f"dataset:{dataset}"}
    job = client.post("/jobs", json=asked).json()["id"]
    worker.work_off()
    error = client.get(f"/jobs/{job}").json()["error"]
    assert (error["code"], error["num_problems"], len(error["problems"])) == ("bad_rows", 122, 100)
    found = [(each["row"], each["field"], each["code"]) for each in error["problems"][:3]]
    assert found == [(4, "messages[0].content", "wrong_type"), (7, None, "bad_json"), (8, "messages", "empty")]
    assert error["message"].startswith("dataset: row 4: messages[0].content is a number")
    listed = client.get("/jobs").json()["data"][0]["error"]
    assert listed["num_problems"] == 122 and listed["problems"] == []
    failed = client.get(f"/jobs/{job}/events").json()["data"][-1]
    assert failed["name"] == "job.failed" and "problems" not in failed["data"]
    with Tunery(url=api.url, api_key=api.key) as tunery:
        told = tunery.jobs.get(job).error
    assert told is not None and told.problems[0].row == 4 and told.problems[0].hint == "write it as a string"
