"""The server as its clients see it: over HTTP, with keys, a store, and a model process that may die."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import context as contexts
from common.context import Context
from common.errors import NotFound
from common.jobs import lifecycle, queries
from common.keys import Caller
from common.schemas.exports import ExportRequest
from tests.processes import wait_until
from tests.worker.serve.conftest import load
from tests.worker.serve.server import BASE_ID, REVISION, Server, publish_job, question, serving, streamed
from tests.worker.trainer.tiny import build_base, sentence
from worker.bases import Base
from worker.serve.catalog import JobCatalog

Folder = Callable[[str], Path]


def expected(base: Path, folder: Path | None, words: str) -> str:
    """Return what stock transformers and peft answer."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    model = load(base) if folder is None else PeftModel.from_pretrained(load(base), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": words}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=3)
    return tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def test_health_says_what_is_held(server: Server):
    with server.client(None) as client:
        assert client.get("/livez").json() == {"alive": True}
        ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() | {"bytes": 0} == {
        "ready": True, "base": BASE_ID, "device": "cpu", "precision": "float32", "bytes": 0, "context": 256,
    }  # fmt: skip


def test_those_who_ask_at_once_get_each_their_own_models_answer(
    server: Server, jobs: dict[str, str], base: Path, adapters: Folder
):
    asked = [("a", sentence(1, 5)), ("b", sentence(2, 12)), (None, sentence(3, 9)), ("a", sentence(4, 20))]
    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(lambda item: server.text(jobs[item[0]] if item[0] else BASE_ID, item[1]), asked))
    assert texts == [expected(base, adapters(kind) if kind else None, words) for kind, words in asked]
    assert len(set(texts)) == 4


def test_an_answer_has_openais_shape(server: Server, jobs: dict[str, str]):
    answer = server.ask(jobs["a"], max_tokens=5)
    assert (
        answer["object"] == "chat.completion" and answer["model"] == jobs["a"] and answer["id"].startswith("chatcmpl-")
    )
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    counts = answer["usage"]
    assert counts["completion_tokens"] == 5 and counts["total_tokens"] == 5 + counts["prompt_tokens"] > 10


def test_a_stream_is_the_whole_answer_in_pieces(server: Server, jobs: dict[str, str]):
    body = question(jobs["a"], max_tokens=20, stream_options={"include_usage": True})
    with server.client() as client:
        *chunks, last = streamed(client, body)
    whole = server.ask(jobs["a"], max_tokens=20)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert len(pieces) > 10 and "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1


def test_words_of_a_request_are_obeyed(server: Server, jobs: dict[str, str]):
    whole = server.text(jobs["a"], max_tokens=20)
    word = whole[6:9]
    stopped = server.ask(jobs["a"], max_tokens=20, stop=word)
    assert stopped["choices"][0]["message"]["content"] == whole[: whole.index(word)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    hot = {"temperature": 1.5, "seed": 3}
    assert server.text(jobs["a"], **hot) == server.text(jobs["a"], **hot) != server.text(jobs["a"])
    assert server.text(jobs["a"], **hot, top_p=1e-6) == server.text(jobs["a"])
    assert server.ask(jobs["a"], max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    system = {"role": "system", "content": "be brief"}
    user = {"role": "user", "content": [{"type": "text", "text": "the quick "}, {"type": "text", "text": "brown fox"}]}
    assert server.text(jobs["a"], messages=[user]) == server.text(jobs["a"])
    developer = server.text(jobs["a"], messages=[{**system, "role": "developer"}, user])
    assert developer == server.text(jobs["a"], messages=[system, user]) != server.text(jobs["a"])


def test_an_answer_is_sent_back_as_it_came(server: Server, jobs: dict[str, str]):
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key=server.key("t"), max_retries=0) as client:
        turns: list[Any] = [{"role": "user", "content": "the quick brown fox"}]
        ask: Any = {"model": jobs["a"], "max_tokens": 3, "temperature": 0, "stream_options": {"include_usage": None}}
        said = client.chat.completions.create(messages=turns, **ask).choices[0].message
        assert said.content
        again = {"role": "user", "content": "a lazy dog"}
        text = client.chat.completions.create(messages=[*turns, said, again], **ask).choices[0].message.content
    plain = {"role": "assistant", "content": said.content}
    assert text == server.text(jobs["a"], messages=[*turns, plain, again], max_tokens=3)


def test_the_least_recently_used_adapter_makes_room_and_comes_back(server: Server, jobs: dict[str, str]):
    first = server.text(jobs["a"])
    server.text(jobs["b"])
    server.catalog.fetched.clear()
    server.text(jobs["a"])
    server.text(jobs["rslora"])
    assert server.catalog.fetched == [jobs["rslora"]], "a was used after b, so b made room"
    assert server.text(jobs["a"]) == first and server.catalog.fetched == [jobs["rslora"]]
    server.text(jobs["b"])
    server.text(jobs["rslora"])
    assert server.text(jobs["a"]) == first
    assert server.catalog.fetched == [jobs["rslora"], jobs["b"], jobs["rslora"], jobs["a"]]


def test_more_adapters_than_there_is_room_for_wait_for_each_other(server: Server, jobs: dict[str, str]):
    kinds = ["a", "b", "rslora", "dora"] * 2
    alone = {kind: server.text(jobs[kind]) for kind in kinds}
    with ThreadPoolExecutor(len(kinds)) as pool:
        assert list(pool.map(lambda kind: server.text(jobs[kind]), kinds)) == [alone[kind] for kind in kinds]


def test_a_weighted_sum_is_a_model_too(server: Server, jobs: dict[str, str], base: Path, adapters: Folder):
    both = server.text(f"{jobs['a']}:0.7+{jobs['b']}:-0.3")
    assert both == server.text(f"{jobs['b']}:-0.3 + {jobs['a']}:0.7")
    assert len({both, server.text(jobs["a"]), server.text(jobs["b"]), server.text(BASE_ID)}) == 4
    assert server.text(f"{jobs['a']}:0") == server.text(BASE_ID)
    assert server.text(f"ft:{BASE_ID}:me::{jobs['a']}") == server.text(jobs["a"]) == server.text(f"{jobs['a']}:1.0")


def test_tenants_do_not_see_each_other(server: Server, jobs: dict[str, str]):
    with server.client("other") as client:
        listed = client.get("/v1/models").json()
        assert [item["id"] for item in listed["data"]] == [BASE_ID, f"ft:tiny:other::{jobs['other']}"]
        assert listed["object"] == "list"
        answers = []
        for model in (jobs["a"], "job_" + "0" * 26, f"{jobs['other']}:0.5+{jobs['a']}:0.5"):
            refused = client.post("/v1/chat/completions", json=question(model))
            answers.append(refused.text.replace(jobs["a"], "X").replace("job_" + "0" * 26, "X"))
            assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"
            assert client.get(f"/v1/models/{model}").status_code == 404
        assert len(set(answers)) == 1, "a job of another tenant is like one that never was"
        assert client.get(f"/v1/models/{jobs['other']}").json()["owned_by"] == "other"
    assert server.text(jobs["other"], tenant="other") == server.text(jobs["a"])
    with server.client() as client:
        assert {item["id"].rpartition(":")[2] for item in client.get("/v1/models").json()["data"]} == {
            BASE_ID, *(jobs[kind] for kind in ("a", "b", "rslora", "dora")),
        }  # fmt: skip


@pytest.mark.parametrize("key", [None, "tnr_wrong"])
def test_strangers_get_nothing(server: Server, jobs: dict[str, str], key: str | None):
    with server.client(None) as client:
        client.headers |= {"authorization": f"Bearer {key}"} if key else {}
        for refused in (client.get("/v1/models"), client.post("/v1/chat/completions", content=b"{" * 9_000_000)):
            assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"


def test_jobs_that_cannot_answer_say_why(server: Server, context: Context, adapters: Folder):
    elsewhere = publish_job(context, "t", adapters("a"), base_id="org/another")
    altered = publish_job(context, "t", adapters("a"))
    with context.read() as session:
        row = queries.row(session, "t", altered)
    context.store.put_bytes(row.manifest_key.removesuffix("manifest.json") + "adapter/adapter_config.json", b"{}")
    waiting = publish_job(context, "t", adapters("a"), ended=False)
    with server.client() as client:
        refused = {
            job: client.post("/v1/chat/completions", json=question(job)) for job in (elsewhere, altered, waiting)
        }
    assert [answer.status_code for answer in refused.values()] == [400, 503, 400]
    assert "tunery serve --base org/another@c0ffee" in refused[elsewhere].json()["error"]["message"]
    assert refused[waiting].json()["error"]["code"] == "job_not_finished"
    assert refused[altered].json()["error"]["code"] == "artifact_altered"
    with server.client() as client:
        listed = {item["id"].rpartition(":")[2] for item in client.get("/v1/models").json()["data"]}
    assert altered in listed and not listed & {elsewhere, waiting}
    with context.write() as session:
        lifecycle.request_cancel(session, "t", waiting)


def test_an_export_names_whom_to_ask_even_before_it_has_ended(server: Server, context: Context, jobs: dict[str, str]):
    with context.write() as session:
        made, _ = lifecycle.export(session, "t", jobs["b"], ExportRequest())
        lifecycle.request_cancel(session, "t", made)
    with server.client() as client:
        refused = client.post("/v1/chat/completions", json=question(made))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "no_adapter") and f"Ask {jobs['b']}" in error["message"]


def test_a_name_that_no_database_stores_is_one_that_there_is_not(context: Context, postgres_url: str):
    installed = contexts.build(context.settings.model_copy(update={"database_url": postgres_url}))
    try:
        with pytest.raises(NotFound, match="does not exist"):
            JobCatalog(installed, Base(BASE_ID, REVISION)).adapter(Caller("k", "t", admin=False), "job_\x00")
    finally:
        installed.close()


BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "no messages": ({"messages": []}, "messages"),
    "unknown field": ({"max_token": 5}, "max_token"),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    "many answers": ({"n": 2}, "n"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "hot": ({"temperature": 2.5}, "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "too many tokens": ({"max_tokens": 100_000}, "max_tokens"),
    "an empty stop word": ({"stop": ["x", ""]}, "stop.1"),
    "too long": ({"messages": [{"role": "user", "content": sentence(1, 400)}]}, "messages"),
    "no model": ({"model": None}, "model"),
    "a wild weight": ({"model": "job_1:1000"}, "model"),
    "nothing to add": ({"model": "job_1+"}, "model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_its_name(server: Server, name: str):
    changes, param = BAD[name]
    with server.client() as client:
        refused = client.post("/v1/chat/completions", json=question(BASE_ID) | changes)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and set(error) == {
        "message", "type", "param", "code",
    }  # fmt: skip


def test_a_body_that_is_none_is_refused(server: Server):
    with server.client() as client:
        for body, status in ((b"{", 400), (b"[]", 400), (b"{" + b" " * 5_000_000, 413)):
            refused = client.post("/v1/chat/completions", content=body)
            assert refused.status_code == status and refused.json()["error"]["message"]
        assert client.get("/v1/engines").status_code == 404
        assert client.get("/v1/chat/completions").status_code == 405
        neutral = {"n": 1, "tools": [], "logprobs": False, "user": "me", "frequency_penalty": 0.0, "stop": None}
        assert client.post("/v1/chat/completions", json=question(BASE_ID) | neutral).status_code == 200


def test_an_adapter_of_nonsense_harms_nobody_else(
    server: Server, context: Context, jobs: dict[str, str], adapters: Folder, tmp_path: Path
):
    shutil.copytree(adapters("a"), tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "adapter_model.safetensors")
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    save_file(broken, tmp_path / "nan" / "adapter_model.safetensors", metadata={"format": "pt"})
    job = publish_job(context, "t", tmp_path / "nan")
    before, pid = server.text(jobs["a"]), server.process._child.pid
    with ThreadPoolExecutor(3) as pool:
        models = [(job, 1.0), (jobs["a"], 0), (job, 0)]
        texts = list(pool.map(lambda item: server.text(item[0], temperature=item[1]), models))
    assert texts[1] == before and server.process._child.pid == pid


@pytest.fixture(scope="module")
def patient(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a base with a very long context, which answers one request at a time."""
    folder = tmp_path_factory.mktemp("patient")
    base = build_base(folder / "base", max_position_embeddings=100_000)
    bounds = {"serve_max_tokens": 90_000, "serve_max_batch_tokens": 10**6, "serve_max_waiting": 1}
    with serving(context, base, folder / "work", **bounds) as made:
        wait_until(lambda: made.process.ready is not None, 120, "the model")
        yield made


LONG = question(BASE_ID, max_tokens=90_000)


def test_who_hangs_up_is_not_answered_any_more(patient: Server):
    with patient.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
        wait_until(lambda: patient.process.num_open == 0, 20, "the server to forget it")
        client.timeout = 2
        with pytest.raises(Exception, match="timed out"):
            client.post("/v1/chat/completions", json=LONG)
    wait_until(lambda: patient.process.num_open == 0, 20, "the server to forget it")
    begun = time.monotonic()
    patient.text(BASE_ID, max_tokens=3)
    assert time.monotonic() - begun < 20, "90,000 tokens would take minutes"


def test_more_than_may_wait_are_sent_away(patient: Server):
    with patient.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            busy = client.post("/v1/chat/completions", json=question(BASE_ID))
        assert busy.status_code == 503 and busy.json()["error"]["code"] == "busy" and busy.headers["retry-after"]
    wait_until(lambda: patient.process.num_open == 0, 20, "the server to forget it")
    assert patient.text(BASE_ID)


def test_a_tenant_leaves_room_for_the_others(patient: Server, monkeypatch: pytest.MonkeyPatch):
    wider = patient.context.settings.model_copy(update={"serve_max_tokens": 90_000, "serve_max_waiting": 4})
    monkeypatch.setattr(patient.service, "_settings", wider)

    with ExitStack() as stack:

        def ask(tenant: str) -> None:
            """Send a question whose answer nobody reads."""
            with patient.client(tenant) as client:
                request = client.build_request("POST", "/v1/chat/completions", json=LONG)
            lines = [f"{name}: {value}" for name, value in request.headers.items()]
            head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""])
            connection = socket.create_connection((request.url.host, request.url.port or 80))
            stack.enter_context(connection).sendall(head.encode() + request.content)

        for _ in range(3):
            ask("t")
        wait_until(lambda: patient.process.num_open == 3, 60, "three to be asked")
        with patient.client("t") as client:
            busy = client.post("/v1/chat/completions", json=LONG)
        assert busy.status_code == 503 and "of your tenant" in busy.json()["error"]["message"]
        ask("u")
        wait_until(lambda: patient.process.num_open == 4, 60, "the other one to be asked")
    wait_until(lambda: patient.process.num_open == 0, 60, "the server to forget them")


def test_a_model_process_that_dies_is_started_again(context: Context, base: Path, tmp_path: Path, jobs: dict[str, str]):
    with serving(context, base, tmp_path / "work", serve_stall_s=5) as server, server.client() as client:
        early = client.post("/v1/chat/completions", json=question(BASE_ID))
        assert early.status_code == 503 and early.headers["retry-after"] and client.get("/readyz").status_code == 503
        assert early.json()["error"]["code"] == "model_loading"
        wait_until(lambda: server.process.ready is not None, 120, "the model")
        before = server.text(jobs["a"])
        # Stopped, and so silent: it is killed, and whoever waits hears of it.
        os.kill(server.process._child.pid, signal.SIGSTOP)
        died = client.post("/v1/chat/completions", json=question(jobs["a"]))
        assert died.status_code == 503 and died.headers["retry-after"]
        assert died.json()["error"]["code"] == "model_died"
        wait_until(lambda: server.process.ready is not None, 120, "the model to come back")
        assert server.text(jobs["a"]) == before
        assert server.catalog.fetched == [jobs["a"]] * 2, "its adapters died with it"


def test_a_base_that_cannot_be_served_ends_the_server(context: Context, base: Path, tmp_path: Path):
    shutil.copytree(base, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").unlink()
    with serving(context, tmp_path / "broken", tmp_path / "work") as server:
        left: list[bool] = []
        server.process.on_hopeless = lambda: left.append(True)
        wait_until(lambda: bool(left), 120, "the model to give up")
        assert server.process.failure is not None and "tokenizer" in server.process.failure.message
