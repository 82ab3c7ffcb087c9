"""Large files: their parts go straight to the object store, and what they make is verified before it is a dataset."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import update

from api.finishing import Finishing
from common import direct_uploads
from common.audit import audit, collect
from common.datasets import Content
from common.db.rows import UploadRow
from common.errors import InfraError
from common.storage.parts import PART_BYTES_MIN, PARTS_MAX
from tests.api.conftest import SPEC, Api
from tests.api.test_datasets import upload as upload_through_api
from worker.sweeper import Sweeper

# Two whole parts of the smallest size that S3 takes, and a rest.
CONTENT = bytes(range(256)) * (2 * PART_BYTES_MIN // 256) + b"the end\n"
PIECES = [CONTENT[:PART_BYTES_MIN], CONTENT[PART_BYTES_MIN : 2 * PART_BYTES_MIN], CONTENT[2 * PART_BYTES_MIN :]]


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def any_api(start: Callable[..., Api], request: pytest.FixtureRequest) -> Api:
    """An API whose parts are as small as S3 allows, over SQLite and over Postgres."""
    return start(request.getfixturevalue(request.param), upload_part_bytes=PART_BYTES_MIN)


@pytest.fixture
def api(start: Callable[..., Api], sqlite_url: str) -> Api:
    """The same over SQLite."""
    return start(sqlite_url, upload_part_bytes=PART_BYTES_MIN)


def announced(content: bytes = CONTENT, **changes: Any) -> dict[str, Any]:
    return {"name": "big.jsonl", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} | changes


def begun(client: httpx2.Client, content: bytes = CONTENT, **changes: Any) -> dict[str, Any]:
    answer = client.post("/uploads", json=announced(content, **changes))
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def put(link: dict[str, Any], content: bytes = CONTENT) -> httpx2.Response:
    body = content[link["offset"] : link["offset"] + link["bytes"]]
    return httpx2.put(link["url"], content=body, trust_env=False)


def links(client: httpx2.Client, upload: dict[str, Any], **params: int) -> list[dict[str, Any]]:
    answer = client.get(f"/uploads/{upload['id']}/parts", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def send(client: httpx2.Client, upload: dict[str, Any], content: bytes = CONTENT) -> None:
    for link in links(client, upload):
        assert put(link, content).status_code == 200


def complete(client: httpx2.Client, upload: dict[str, Any]) -> httpx2.Response:
    return client.post(f"/uploads/{upload['id']}/complete", params={"wait": 60})


def left(api: Api) -> tuple[list[str], int]:
    """Return the keys of all objects of the tenant, and how many multipart uploads the store waits for."""
    keys = [item.key for item in api.context.store.objects("default/")]
    store = api.context.store
    return keys, len(store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", []))


def refused(answer: httpx2.Response, status: int, code: str, param: str | None) -> None:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem.get("param")) == (status, code, param), problem


def test_the_whole_life(any_api: Api) -> None:
    with any_api.client() as client:
        answer = client.post("/uploads", json=announced(name="a/b/big.jsonl"))
        upload = answer.json()
        assert answer.status_code == 201 and answer.headers["location"] == f"/uploads/{upload['id']}"
        assert (upload["status"], upload["name"], upload["num_parts"]) == ("pending", "big.jsonl", 3)
        assert upload["parts"] == [] and upload["part_bytes"] == PART_BYTES_MIN and upload["dataset"] is None
        page = client.get(f"/uploads/{upload['id']}/parts", params={"limit": 2}).json()
        assert [link["number"] for link in page["data"]] == [1, 2] and page["has_more"] and page["next"] == 2
        [last] = links(client, upload, after=2)
        assert (last["number"], last["offset"], last["bytes"]) == (3, 2 * PART_BYTES_MIN, len(PIECES[2]))
        assert put(last).status_code == 200 and put(page["data"][0]).status_code == 200
        assert [part["number"] for part in client.get(f"/uploads/{upload['id']}").json()["parts"]] == [1, 3]
        refused(complete(client, upload), 409, "parts_missing", "parts")
        assert [link["number"] for link in links(client, upload)] == [2], "only what is missing"
        assert audit(any_api.context).orphans == []
        send(client, upload)

        done = complete(client, upload)
        dataset = done.json()["dataset"]
        assert done.status_code == 200 and done.json()["status"] == "completed"
        assert (dataset["name"], dataset["bytes"]) == ("big.jsonl", len(CONTENT))
        key = f"default/datasets/{hashlib.sha256(CONTENT).hexdigest()}"
        assert left(any_api) == ([key], 0) and any_api.context.store.get_bytes(key) == CONTENT
        assert client.get(f"/datasets/{dataset['id']}").json() == dataset
        assert client.post("/jobs", json={**SPEC, "dataset": dataset["uri"]}).status_code == 201

        assert complete(client, upload).json() == done.json(), "once more is the same"
        assert client.get(f"/uploads/{upload['id']}").json() == done.json()
        refused(client.delete(f"/uploads/{upload['id']}"), 409, "upload_completed", "upload_id")
        refused(client.get(f"/uploads/{upload['id']}/parts"), 409, "upload_completed", "upload_id")
        assert put(page["data"][0]).status_code == 404, "no link changes what is complete"
        assert any_api.context.store.get_bytes(key) == CONTENT


def test_content_that_is_there_is_not_sent_again(any_api: Api) -> None:
    small = b'{"text": "a"}\n'
    with any_api.client() as client:
        dataset = upload_through_api(client, small).json()
        upload = begun(client, small, name="train.jsonl")
        assert upload["status"] == "completed" and upload["dataset"] == dataset
        renamed = begun(client, small, name="other.jsonl", sha256=dataset["sha256"].upper())["dataset"]
        assert renamed["id"] != dataset["id"] and renamed["sha256"] == dataset["sha256"]
        refused(client.post("/uploads", json=announced(small, bytes=9)), 400, "invalid_input", "bytes")
        assert left(any_api) == ([f"default/datasets/{dataset['sha256']}"], 0), "one object, two names"
    with any_api.client(any_api.new_key("stranger")) as stranger:
        assert begun(stranger, small)["status"] == "pending", "what another tenant has is nobody's business"


def test_an_unfinished_upload_goes_on(any_api: Api) -> None:
    with any_api.client() as client:
        first = begun(client)
        assert put(links(client, first)[1]).status_code == 200
        again = client.post("/uploads", json=announced(name="renamed.jsonl"))
        assert again.status_code == 200 and again.json()["id"] == first["id"]
        assert [part["number"] for part in again.json()["parts"]] == [2]
        with any_api.client(any_api.new_key("stranger")) as stranger:
            other = begun(stranger)
            assert other["id"] != first["id"] and other["parts"] == []
            assert stranger.delete(f"/uploads/{other['id']}").status_code == 204
        send(client, first)
        assert complete(client, first).json()["dataset"]["name"] == "renamed.jsonl"


def test_two_who_begin_and_complete_at_once(any_api: Api) -> None:
    def whole(number: int) -> tuple[str, str]:
        with any_api.client() as client:
            upload = begun(client)
            together.wait(30)
            for link in links(client, upload):
                put(link)
            together.wait(30)
            return upload["id"], complete(client, upload).json()["dataset"]["id"]

    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(whole, range(4)))
    assert len(made) == 1, "one upload, one dataset"
    assert len(left(any_api)[0]) == 1 and left(any_api)[1] == 0


def test_two_processes_that_complete_at_once(any_api: Api) -> None:
    with any_api.client() as client:
        upload = begun(client)
        send(client, upload)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: direct_uploads.complete(any_api.context, "default", upload["id"]), range(4)))
    assert len({standing.dataset.id for standing in done if standing.dataset}) == 1 and len(done) == 4
    assert len(left(any_api)[0]) == 1


def test_what_was_not_announced_is_not_kept(any_api: Api) -> None:
    with any_api.client() as client:
        upload = begun(client, sha256="0" * 64)
        send(client, upload)
        refused(complete(client, upload), 400, "hash_mismatch", "sha256")
        assert left(any_api) == ([], 0) and client.get("/datasets").json()["data"] == []
        refused(complete(client, upload), 400, "hash_mismatch", "sha256")
        assert client.get(f"/uploads/{upload['id']}").json()["status"] == "failed"
        refused(client.get(f"/uploads/{upload['id']}/parts"), 409, "upload_failed", "upload_id")

        wrong_bytes = begun(client)
        send(client, wrong_bytes, CONTENT[:-1] + b"!")
        refused(complete(client, wrong_bytes), 400, "hash_mismatch", "sha256")
        assert left(any_api) == ([], 0)
        right = begun(client)
        assert right["id"] != wrong_bytes["id"] and right["parts"] == []
        send(client, right)
        assert complete(client, right).status_code == 200


def test_a_link_takes_exactly_its_bytes_for_a_while(start: Callable[..., Api], sqlite_url: str) -> None:
    api = start(sqlite_url, upload_part_bytes=PART_BYTES_MIN, link_s=10)
    with api.client() as client:
        upload = begun(client)
        link = links(client, upload)[2]
        for wrong in (b"", PIECES[2] + b"x", PIECES[2][:-1]):
            assert httpx2.put(link["url"], content=wrong, trust_env=False).status_code == 403
        assert "X-Amz-Expires=10&" in link["url"]
        assert put({**link, "url": link["url"].replace("partNumber=3", "partNumber=4")}).status_code == 403
        assert client.get(f"/uploads/{upload['id']}").json()["parts"] == []


def test_given_up(any_api: Api) -> None:
    with any_api.client() as client:
        upload = begun(client)
        old = links(client, upload)
        assert put(old[0]).status_code == 200 and left(any_api)[1] == 1
        for _ in range(2):
            assert client.delete(f"/uploads/{upload['id']}").status_code == 204
        assert left(any_api) == ([], 0) and put(old[1]).status_code == 404
        refused(complete(client, upload), 409, "upload_cancelled", "upload_id")
        assert begun(client)["id"] != upload["id"]


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url"])
def test_unfinished_uploads_have_a_bound(
    start: Callable[..., Api], database: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(database)
    api = start(url, upload_part_bytes=PART_BYTES_MIN, max_unfinished_uploads=2)
    parts = {"filename": "b.jsonl", "purpose": "fine-tune", "bytes": 9, "mime_type": "application/jsonl"}
    with api.client() as client:
        first = begun(client)
        assert client.post("/v1/uploads", json=parts).status_code == 200, "both kinds count together"
        over = client.post("/uploads", json=announced(b"another"))
        refused(over, 429, "quota_uploads", None)
        assert first["id"] in over.json()["hint"] or "b.jsonl" in over.json()["hint"]
        assert over.headers["retry-after"] and left(api)[1] == 1, "the store waits for nothing more"
        other = client.post("/v1/uploads", json=parts)
        assert (other.status_code, other.json()["error"]["code"]) == (429, "quota_uploads")
        assert begun(client)["id"] == first["id"], "what is unfinished goes on"
        assert client.delete(f"/uploads/{first['id']}").status_code == 204
        assert begun(client, b"another")["id"] != first["id"]


def test_what_is_abandoned_is_collected(any_api: Api) -> None:
    context = any_api.context
    with any_api.client() as client:
        waiting, abandoned, joined = (begun(client, CONTENT + tail) for tail in (b"", b"2", b"3"))
        for upload, content in ((waiting, CONTENT), (abandoned, CONTENT + b"2"), (joined, CONTENT + b"3")):
            send(client, upload, content)
        with context.read() as session:
            row = session.get(UploadRow, joined["id"])
        assert row is not None
        direct_uploads._join(context.store, row)
        collect(context, older_than_s=0)
        assert left(any_api) == ([f"default/uploads/{joined['id']}/whole"], 2), "what a row waits for is in use"

        with context.write() as session:
            late = UploadRow.id.in_([abandoned["id"], joined["id"]])
            session.execute(update(UploadRow).where(late).values(expires_at=1.0))
        assert client.get(f"/uploads/{abandoned['id']}").json()["status"] == "expired"
        refused(complete(client, abandoned), 409, "upload_expired", "upload_id")
        Sweeper(context).sweep()
        assert client.get(f"/uploads/{abandoned['id']}").status_code == 404
        assert left(any_api) == ([], 1)
        before = client.get(f"/uploads/{waiting['id']}").json()["expires_at"]
        links(client, waiting)
        assert client.get(f"/uploads/{waiting['id']}").json()["expires_at"] > before, "whoever asks is still there"
        assert complete(client, waiting).status_code == 200


def test_an_upload_that_no_row_knows_is_collected(api: Api) -> None:
    store = api.context.store
    store.begin_parts("default/uploads/upload_lost/whole")
    assert left(api)[1] == 1
    collect(api.context, older_than_s=3600)
    assert left(api)[1] == 1, "its row may be about to be written"
    collect(api.context, older_than_s=0)
    assert left(api)[1] == 0


def test_an_upload_that_the_store_has_ended_begins_anew(api: Api) -> None:
    store = api.context.store
    with api.client() as client:
        upload = begun(client)
        store.abort_uploads(0)
        refused(client.get(f"/uploads/{upload['id']}/parts"), 409, "upload_lost", "upload_id")
        refused(complete(client, upload), 409, "upload_lost", "upload_id")
        new = begun(client)
        assert new["id"] != upload["id"]
        send(client, new)
        assert complete(client, new).status_code == 200


def test_a_completion_goes_on_where_another_process_died(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with api.client() as client:
        upload = begun(client)
        send(client, upload)
        with monkeypatch.context() as patch:
            patch.setattr("common.datasets.add", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                direct_uploads.complete(api.context, "default", upload["id"])
        assert len(begun(client)["parts"]) == 3 and links(client, upload) == []
        assert complete(client, upload).status_code == 200


def test_a_store_that_is_away(start: Callable[..., Api], sqlite_url: str, api: Api) -> None:
    with api.client() as client:
        upload = begun(client)
        send(client, upload)
    away = start(sqlite_url, s3_endpoint_url="http://127.0.0.1:9", s3_secret_access_key=SecretStr("very-secret"))
    with away.client() as client:
        for answer in (
            client.post("/uploads", json=announced(b"other")),
            client.post("/uploads", json=announced()),
            client.get(f"/uploads/{upload['id']}/parts"),
            complete(client, upload),
        ):
            refused(answer, 503, "store_away", None)
            assert answer.headers["retry-after"]
    with api.client() as client:
        assert complete(client, upload).status_code == 200, "nothing was lost"


def test_a_long_verification_is_asked_for_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits longer than he wants, the work is done once, and the API answers others meanwhile."""
    held, original, begins = threading.Event(), direct_uploads._sha256, []

    def slow(*arguments: Any) -> str:
        begins.append(threading.current_thread())
        held.wait(60)
        return original(*arguments)

    monkeypatch.setattr(direct_uploads, "_sha256", slow)
    with api.client() as client:
        upload = begun(client)
        send(client, upload)
        for _ in range(3):
            answer = client.post(f"/uploads/{upload['id']}/complete", params={"wait": 0})
            assert answer.status_code == 202 and answer.headers["retry-after"] == "1"
            assert answer.json()["status"] == "pending" and len(answer.json()["parts"]) == 3
        assert client.get("/livez").status_code == 200
        held.set()
        assert complete(client, upload).status_code == 200
    assert len(begins) == 1


def test_a_server_that_stops_waits_for_no_file(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, end = threading.Event(), time.monotonic() + 60

    def endless(_: str) -> Iterator[bytes]:
        while time.monotonic() < end:
            reading.set()
            yield b"x"

    async def stop_in_the_middle() -> None:
        finishing = Finishing(api.context)
        assert await finishing.finish("default", upload["id"], 0) is None
        assert await asyncio.to_thread(reading.wait, 30)
        finishing.close()
        with pytest.raises(InfraError, match="the server stops"):
            await finishing.finish("default", upload["id"], 120)
        assert time.monotonic() < end

    with api.client() as client:
        upload = begun(client)
        send(client, upload)
        with monkeypatch.context() as patch:
            patch.setattr(api.context.store, "chunks", endless)
            asyncio.run(stop_in_the_middle())
        assert complete(client, upload).status_code == 200, "nothing was lost"


def test_the_hash_is_made_without_holding_the_file(api: Api) -> None:
    content = b"z" * (24 * 2**20)
    with api.client() as client:
        upload = begun(client, content)
        send(client, upload, content)
    tracemalloc.start()
    try:
        direct_uploads.complete(api.context, "default", upload["id"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20, f"{peak} bytes for a file of {len(content)}"


def test_what_cannot_be_begun(start: Callable[..., Api], sqlite_url: str) -> None:
    api = start(sqlite_url, max_dataset_bytes=1000)
    with api.client() as client:
        for change, param in (
            ({"bytes": 0}, "bytes"),
            ({"bytes": 1001}, "bytes"),
            ({"sha256": "0" * 63}, "sha256"),
            ({"sha256": "g" * 64}, "sha256"),
            ({"name": ""}, "name"),
            ({"parts": 3}, "parts"),
        ):
            answer = client.post("/uploads", json=announced(b"x", **change))
            assert answer.status_code == 400 and answer.json()["param"] == param, answer.text
    assert left(api) == ([], 0)


def test_parts_grow_where_there_would_be_too_many(api: Api) -> None:
    content = Content("a", 2**40, "0" * 64)
    row = direct_uploads._new(api.context, "default", content)
    assert row.part_bytes is not None and row.part_bytes % 2**20 == 0
    assert direct_uploads.num_parts(row) <= PARTS_MAX < 2**40 // PART_BYTES_MIN
    assert direct_uploads.part(row, direct_uploads.num_parts(row)).bytes > 0


def test_links_are_in_no_log(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with api.client() as client:
        upload = begun(client)
        send(client, upload)
        complete(client, upload)
    own = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx2", "httpcore2"))]
    assert any(upload["id"] in line for line in own) and not any("X-Amz-" in line for line in own)
