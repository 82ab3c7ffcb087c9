"""A preview from the question over HTTP to a preflight worker and back, by client and command."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console
from sqlalchemy import select, update
from typer.testing import CliRunner

from common import previews
from common.cli import previewed
from common.cli.app import app
from common.client import AsyncTunery, Tunery
from common.db.engine import db_now
from common.db.rows import PreviewRow
from common.errors import InvalidInput
from common.schemas.previews import Preview
from tests.api.conftest import SPEC, Api
from tests.worker.trainer.tiny import chat_rows
from worker import previews as making
from worker.supervisor import Supervisor
from worker.sweeper import Sweeper


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


_PLAIN_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


async def _asked_async(api: Api, dataset: str, **fields: Any) -> Preview:
    async with AsyncTunery(url=api.url, api_key=api.key) as tunery:
        return await tunery.datasets.preview(dataset, "llama", **fields)


def test_a_chat_template_of_the_request_is_used(
    api: Api, worker: Supervisor, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rendered = threading.Timer(0.5, worker.work_off)
    rendered.start()
    found = asyncio.run(_asked_async(api, dataset, rows=1, chat_template=_PLAIN_TEMPLATE))
    rendered.join()
    user, answer = (message["content"] for message in chat_rows(1)[0]["messages"])
    assert "".join(token.text for token in found.rows[0].tokens) == f"<user>{user}</s><assistant>{answer}</s>"
    assert found.template == "request"
    monkeypatch.setenv("TUNERY_URL", api.url)
    monkeypatch.setenv("TUNERY_API_KEY", api.key)
    (tmp_path / "chat.jinja").write_text(_PLAIN_TEMPLATE)
    command = ["datasets", "preview", dataset, "--model", "llama", "--rows", "1", "-o", "json"]
    # The same question is answered by the same rows.
    shown = CliRunner().invoke(app, [*command, "--chat-template", str(tmp_path / "chat.jinja")])
    assert json.loads(shown.stdout) == found.model_dump(mode="json"), shown.output


def test_a_chat_template_that_cannot_run_is_refused_as_the_requests(api: Api, worker: Supervisor, dataset: str):
    with Tunery(url=api.url, api_key=api.key) as tunery:
        rendered = threading.Timer(0.5, worker.work_off)
        rendered.start()
        with pytest.raises(InvalidInput, match="cannot be run") as caught:
            tunery.datasets.preview(dataset, "llama", chat_template="{% for %}")
        rendered.join()
    assert caught.value.param == "chat_template"


def test_a_terminal_shows_what_is_trained_in_green(api: Api, worker: Supervisor, dataset: str):
    rendered = threading.Timer(0.5, worker.work_off)
    rendered.start()
    found = asyncio.run(_asked_async(api, dataset, rows=1))
    rendered.join()
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard", markup=False)
    previewed.show(found, console)
    out, answer = console.file.getvalue(), chat_rows(1)[0]["messages"][1]["content"]
    assert f"\x1b[1;32m{answer}<|im_end|>\x1b[0m" in out and "⟦" not in out
    assert "\x1b[2m<|im_start|>user" in out


def test_a_preview_whose_bell_or_worker_was_lost_is_rung_for_again(
    api: Api, client: httpx2.Client, worker: Supervisor, dataset: str, monkeypatch: pytest.MonkeyPatch
):
    url, rung = f"/datasets/{dataset}/preview?model=llama&rows=1&wait=", []
    assert client.get(url + "0").status_code == 202
    monkeypatch.setattr(type(api.context.doorbell), "ring", lambda _, which, times=1: rung.append((which, times)))
    sweeper = Sweeper(api.context)
    sweeper.sweep()
    assert rung == [("preflight", 1)]
    with api.context.write() as session:
        dead = previews.claim(session, "killed")
    sweeper.sweep()
    assert dead is not None and rung == [("preflight", 1)], "somebody makes it"
    with api.context.write() as session:
        session.execute(update(PreviewRow).values(lease_expires_at=db_now() - 1))
    sweeper.sweep()
    assert rung == [("preflight", 1)] * 2
    worker.work_off()
    assert client.get(url + "0").json()["status"] == "ready"
    sweeper.sweep()
    assert len(rung) == 2


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
