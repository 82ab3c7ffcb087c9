"""A preview from the question over HTTP to a preflight worker and back, by client and command."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from common import previews
from common.cli.app import app
from common.client import Tunery
from common.db.rows import PreviewRow
from common.errors import InvalidInput
from tests.api.conftest import SPEC, Api
from tests.worker.trainer.tiny import chat_rows
from worker import previews as making
from worker.supervisor import Supervisor


@pytest.fixture
def api(start: Callable[..., Api], sqlite_url: str, tmp_path: Path) -> Api:
    return start(sqlite_url, work_dir=tmp_path / "work")


@pytest.fixture
def dataset(client: httpx2.Client) -> str:
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows(7))
    return str(client.post("/datasets", files={"file": ("train.jsonl", rows)}).json()["id"])


def test_from_the_question_to_the_rows(
    api: Api, client: httpx2.Client, worker: Supervisor, dataset: str, monkeypatch: pytest.MonkeyPatch
):
    url = f"/datasets/{dataset}/preview?model=llama&rows=2&wait="
    waiting = client.get(url + "0")
    assert (waiting.status_code, waiting.json()["status"]) == (202, "waiting") and waiting.headers["retry-after"] == "1"
    # Who waits is answered as soon as the rows are there.
    rendered = threading.Thread(target=worker.work_off)
    rendered.start()
    ready = client.get(url + "60")
    rendered.join()
    assert ready.status_code == 200, ready.text
    told = ready.json()
    assert [row["row"] for row in told["rows"]] == [1, 2] and told["has_more"] and told["max_length"] == 256
    first = told["rows"][0]
    answer = chat_rows(1)[0]["messages"][1]["content"]
    assert "".join(token["text"] for token in first["tokens"] if token["trained"]) == f"{answer}<|im_end|>"
    with Tunery(url=api.url, api_key=api.key) as tunery:
        assert (
            tunery.datasets.preview(f"dataset:{dataset}", "llama", rows=2).rows[0].num_trained == first["num_trained"]
        )
    monkeypatch.setenv("TUNERY_URL", api.url)
    monkeypatch.setenv("TUNERY_API_KEY", api.key)
    command = ["datasets", "preview", dataset, "--model", "llama", "--rows", "2"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert f"<|im_start|>assistant\n⟦{answer}<|im_end|>⟧" in shown.output and "more: --offset 2" in shown.output
    as_json = CliRunner().invoke(app, [*command, "-o", "json"])
    assert json.loads(as_json.stdout)["rows"][0]["tokens"] == first["tokens"]


def test_what_cannot_be_shown_says_why(api: Api, client: httpx2.Client, worker: Supervisor, dataset: str):
    for query, status, code in (
        ("model=nobody", 400, "base_not_found"),
        ("model=llama&rows=0", 400, "invalid_input"),
        ("model=llama&loss=some", 400, "invalid_input"),
    ):
        found = client.get(f"/datasets/{dataset}/preview?{query}")
        assert (found.status_code, found.json()["code"]) == (status, code), found.text
    with api.client(api.new_key("other")) as stranger:
        assert stranger.get(f"/datasets/{dataset}/preview?model=llama").status_code == 404
    with Tunery(url=api.url, api_key=api.key) as tunery:
        rendered = threading.Timer(1, worker.work_off)
        rendered.start()
        with pytest.raises(InvalidInput, match="max_length"):
            tunery.datasets.preview(dataset, "llama", max_length=512)
        rendered.join()


def test_previews_do_not_keep_jobs_from_being_checked(
    api: Api,
    client: httpx2.Client,
    worker: Supervisor,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(making, "TURN_S", 0.0)
    for rows in (1, 2):
        client.get(f"/datasets/{dataset}/preview?model=llama&rows={rows}&wait=0")
    job = client.post("/jobs", json=SPEC | {"dataset": f"file://{tmp_path}/local/none.jsonl"}).json()["id"]
    worker.work_off()
    failed = client.get(f"/jobs/{job}").json()
    assert failed["error"]["code"] == "dataset_not_found"
    with api.context.read() as session:
        answered = sorted(row.expires_at - previews.KEPT_S for row in session.scalars(select(PreviewRow)))
    ended = datetime.fromisoformat(failed["finished_at"]).timestamp()
    assert answered[0] < ended < answered[1], "the job had its turn between them, and no preview was left"
