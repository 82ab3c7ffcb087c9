"""Listing, reading, waiting for, wishing for and deleting jobs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
from sqlalchemy import update

from common.db.rows import IdempotencyRow
from common.jobs import lifecycle
from tests.api.conftest import SPEC, Api, drive, finish


def submit(client: httpx2.Client, **fields: object) -> str:
    answer = client.post("/jobs", json={**SPEC, **fields})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_pages_hold_every_job_once_newest_first(any_api: Api) -> None:
    with any_api.client() as client:
        for number in range(7):
            submit(client, metadata={"team": "a" if number % 2 else "b", "x.y": "1"})
        found, after = [], None
        while True:
            page = client.get("/jobs", params={"limit": 3} | ({"after": after} if after else {})).json()
            found += [job["id"] for job in page["data"]]
            after = page["next"]
            assert page["has_more"] == (after is not None)
            if after is None:
                break
        assert found == sorted(found, reverse=True) and len(set(found)) == 7
        labelled = client.get("/jobs", params={"metadata[team]": "a", "metadata[x.y]": "1"}).json()["data"]
        assert [job["metadata"]["team"] for job in labelled] == ["a"] * 3
        assert client.get("/jobs", params={"metadata[team]": "c"}).json()["data"] == []
        quoted = submit(client, metadata={"a'\"b\\": "'\"\\%"})
        labelled = client.get("/jobs", params={"metadata[a'\"b\\]": "'\"\\%"}).json()["data"]
        assert [job["id"] for job in labelled] == [quoted]
        client.post(f"/jobs/{found[0]}/cancel")
        states = client.get("/jobs", params={"status": ["cancelled", "queued"]}).json()["data"]
        assert [job["id"] for job in states] == [found[0]]
        assert len(client.get("/jobs", params={"status": "validating"}).json()["data"]) == 7


def test_the_tag_of_a_job_changes_with_it(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    tag = client.get(f"/jobs/{job_id}").headers["etag"]
    same = client.get(f"/jobs/{job_id}", headers={"if-none-match": f'"other", W/{tag}'})
    assert same.status_code == 304 and same.content == b"" and same.headers["etag"] == tag
    drive(api.context, job_id)
    changed = client.get(f"/jobs/{job_id}", headers={"if-none-match": tag})
    assert changed.status_code == 200 and changed.json()["status"] == "running"


def test_a_long_poll_answers_when_the_job_changes(any_api: Api) -> None:
    with any_api.client() as client, ThreadPoolExecutor(1) as pool:
        job_id = submit(client)
        waiting = pool.submit(client.get, f"/jobs/{job_id}", params={"wait": 20})
        watched(any_api, job_id)
        began = time.monotonic()
        drive(any_api.context, job_id)
        assert waiting.result(10).json()["status"] in ("validating", "queued", "running")
        assert time.monotonic() - began < 5


def watched(api: Api, job_id: str) -> None:
    """Wait until somebody waits for the job."""
    deadline = time.monotonic() + 10
    while not any(each.job_id == job_id for each in list(api.watcher._subscriptions)):
        assert time.monotonic() < deadline, "nobody waits"
        threading.Event().wait(0.01)


def test_a_long_poll_does_not_wait_for_what_is_known_or_over(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    began = time.monotonic()
    stale = client.get(f"/jobs/{job_id}", params={"wait": 30}, headers={"if-none-match": '"0"'})
    assert stale.status_code == 200
    client.post(f"/jobs/{job_id}/cancel")
    assert client.get(f"/jobs/{job_id}", params={"wait": 30}).json()["status"] == "cancelled"
    assert time.monotonic() - began < 10
    same = client.get(f"/jobs/{submit(client)}", params={"wait": 1})
    assert same.status_code == 200 and time.monotonic() - began < 10


def test_wishes(any_api: Api) -> None:
    with any_api.client() as client:
        job_id = submit(client)
        assert client.post(f"/jobs/{job_id}/resume").status_code == 409
        assert client.post(f"/jobs/{job_id}/pause").json()["desired"] == "pause"
        assert client.post(f"/jobs/{job_id}/resume").json()["desired"] == "run"
        drive(any_api.context, job_id)
        assert client.post(f"/jobs/{job_id}/cancel").json()["desired"] == "cancel"
        refused = client.post(f"/jobs/{job_id}/pause")
        assert refused.status_code == 409 and refused.headers["x-should-retry"] == "false"
        problem = refused.json()
        assert problem["code"] == "cannot_pause" and problem["status"] == 409 and problem["request_id"]
        waiting = submit(client)
        assert client.post(f"/jobs/{waiting}/cancel").json()["status"] == "cancelled"
        assert client.post(f"/jobs/{waiting}/cancel").json()["status"] == "cancelled", "twice is once"


def test_delete_takes_rows_and_objects(any_api: Api) -> None:
    with any_api.client() as client:
        job_id = submit(client, metadata={"a": "b"})
        claim = drive(any_api.context, job_id)
        refused = client.delete(f"/jobs/{job_id}")
        assert refused.status_code == 409 and refused.json()["code"] == "cannot_delete"
        with any_api.context.write() as session:
            lifecycle.checkpointed(session, claim, step=5, prefix="p", manifest_sha256="0" * 64, num_bytes=3)
        [checkpoint] = client.get(f"/jobs/{job_id}/checkpoints").json()["data"]
        # The check was the first lease of the job, and is no attempt to train it.
        assert (checkpoint["step"], checkpoint["bytes"], checkpoint["attempt"], claim.epoch) == (5, 3, 1, 2)
        assert client.get(f"/jobs/{job_id}").json()["attempt"] == 1
        finish(any_api.context, claim)
        assert list(any_api.context.store.objects(f"default/{job_id}/"))
        assert client.delete(f"/jobs/{job_id}").status_code == 204
        assert client.get(f"/jobs/{job_id}").status_code == 404
        assert client.delete(f"/jobs/{job_id}").status_code == 404
        assert not list(any_api.context.store.objects(f"default/{job_id}/"))


def test_an_adapter_before_its_time(client: httpx2.Client) -> None:
    job_id = submit(client)
    answer = client.get(f"/jobs/{job_id}/adapter")
    assert answer.status_code == 409 and answer.json()["code"] == "wrong_state"
    assert client.get(f"/jobs/{job_id}/artifacts").json() == {"data": []}


def test_racing_creates_with_one_key_make_one_job(any_api: Api) -> None:
    barrier = threading.Barrier(6)

    def create(_: int) -> tuple[int, str]:
        with any_api.client() as client:
            barrier.wait()
            answer = client.post("/jobs", json=SPEC, headers={"idempotency-key": "k1"})
            return answer.status_code, answer.json()["id"]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(create, range(6)))
    assert {status for status, _ in answers} == {201}
    assert len({job_id for _, job_id in answers}) == 1
    with any_api.client() as client:
        assert len(client.get("/jobs").json()["data"]) == 1
        again = client.post("/jobs", json=SPEC, headers={"idempotency-key": "k1"})
        assert again.headers["idempotent-replayed"] == "true"
        other = client.post("/jobs", json={**SPEC, "seed": 7}, headers={"idempotency-key": "k1"})
        assert other.status_code == 409 and other.json()["code"] == "idempotency_key_reused"
    with any_api.client(any_api.new_key("other")) as client:
        elsewhere = client.post("/jobs", json=SPEC, headers={"idempotency-key": "k1"})
        assert elsewhere.json()["id"] != answers[0][1], "keys of tenants are apart"


def test_the_same_create_without_a_key_makes_one_job(start: Callable[..., Api], database_url: str) -> None:
    api = start(database_url, repeat_window_s=30)
    barrier = threading.Barrier(6)

    def create(_: int) -> httpx2.Response:
        with api.client() as client:
            barrier.wait()
            return client.post("/jobs", json=SPEC)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(create, range(6)))
    [first] = {answer.json()["id"] for answer in answers}
    assert [answer.headers.get("idempotent-replayed") for answer in answers].count(None) == 1
    with api.client() as client, api.client(api.new_key()) as colleague:
        # What was asked is compared, not how it was written.
        assert submit(client, seed=42) == first
        assert submit(client, seed=7) != first
        assert submit(colleague) != first
        client.post(f"/jobs/{first}/cancel")
        second = submit(client)
        assert second != first and submit(client) == second


def test_the_same_create_later_makes_another_job(start: Callable[..., Api], sqlite_url: str) -> None:
    api = start(sqlite_url, repeat_window_s=30)
    with api.client() as client:
        first = submit(client)
        with api.context.write() as session:
            session.execute(update(IdempotencyRow).values(created_at=IdempotencyRow.created_at - 29))
        assert submit(client) == first
        with api.context.write() as session:
            session.execute(update(IdempotencyRow).values(created_at=IdempotencyRow.created_at - 2))
        second = submit(client)
        assert second != first and submit(client) == second


def test_history_in_pages(any_api: Api) -> None:
    with any_api.client() as client:
        job_id = submit(client)
        claim = drive(any_api.context, job_id)
        for step in (1, 2, 3):
            with any_api.context.write() as session:
                point = lifecycle.MetricPoint(step, {"loss": float(step)})
                lifecycle.advance(session, claim, progress={"step": step}, metrics=[point])
        first = client.get(f"/jobs/{job_id}/events", params={"limit": 2}).json()
        rest = client.get(f"/jobs/{job_id}/events", params={"after": first["next"]}).json()
        assert first["has_more"] and not rest["has_more"]
        names = [event["name"] for event in first["data"] + rest["data"]]
        assert names == ["job.submitted", "job.checking", "job.accepted", "job.claimed"]
        metrics = client.get(f"/jobs/{job_id}/metrics", params={"limit": 2}).json()
        assert [point["values"]["loss"] for point in metrics["data"]] == [1.0, 2.0] and metrics["has_more"]
