"""Jobs like other jobs, jobs that are looked for, and one wish for many."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from sqlalchemy import update

from common.db.rows import JobRow
from tests.api.conftest import BASE, SPEC, Api, drive, finish
from tests.api.test_jobs import submit

ASKED = {
    "suffix": "first",
    "lora": {"r": 4},
    "hyperparameters": {"learning_rate": 1e-3},
    "metadata": {"a": "1", "b": "2"},
}


def clone(client: httpx2.Client, job_id: str, changes: object, **headers: str) -> httpx2.Response:
    return client.post(f"/jobs/{job_id}/clone", json=changes, headers=headers)


def test_a_clone_differs_where_it_was_told_to(any_api: Api) -> None:
    with any_api.client() as client:
        first = submit(client, **ASKED)
        changes = {"lora": {"r": 8}, "hyperparameters": {"max_steps": 7}, "suffix": None, "metadata": {"a": None}}
        answer = clone(client, first, changes)
        assert answer.status_code == 201 and answer.headers["location"] == f"/jobs/{answer.json()['id']}"
        made, old = answer.json(), client.get(f"/jobs/{first}").json()
        assert made["id"] != first and made["status"] == "validating"
        assert made["lora"] == old["lora"] | {"r": 8}
        assert made["hyperparameters"] == old["hyperparameters"] | {"max_steps": 7}
        assert (made["suffix"], made["metadata"]) == (None, {"b": "2"})
        [submitted] = client.get(f"/jobs/{made['id']}/events").json()["data"]
        assert submitted["data"] == {"clone_of": first}
        full = clone(client, first, {"method": "full", "lora": None, "quantization": None, "export": None})
        assert (full.json()["method"], full.json()["lora"]) == ("full", None)
        assert client.get(f"/jobs/{first}").json()["suffix"] == "first", "the old one is as it was"


def test_a_job_in_any_state_can_be_cloned(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    finish(api.context, drive(api.context, job_id))
    assert clone(client, job_id, {}).json()["status"] == "validating"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"lora": {"rank": 8}}, "lora.rank"),
        ({"hyperparameters": {"learning_rate": "fast"}}, "hyperparameters.learning_rate"),
        ({"model": None}, "model"),
        ({"model": "no-such-base"}, "model"),
        ({"method": "full"}, "quantization.load_in_4bit"),
        ({"dataset": "dataset:ds_absent"}, "dataset"),
        ({"nonsense": 1}, "nonsense"),
        ([], None),
        ("text", None),
    ],
)
def test_a_clone_that_is_no_job(client: httpx2.Client, changes: object, param: str | None) -> None:
    answer = clone(client, submit(client), changes)
    assert (answer.status_code, answer.json().get("param")) == (400, param), answer.text
    assert len(client.get("/jobs").json()["data"]) == 1


def test_an_unknown_key_of_a_clone_is_explained(client: httpx2.Client) -> None:
    assert clone(client, submit(client), {"r": 8}).json()["hint"] == "It belongs in lora."


def test_a_deep_patch_is_refused_and_breaks_nothing(client: httpx2.Client) -> None:
    deep: dict = {}
    for _ in range(500):
        deep = {"lora": deep}
    assert clone(client, submit(client), deep).status_code == 400


def test_a_clone_is_made_once(start: Callable[..., Api], database_url: str) -> None:
    api = start(database_url, repeat_window_s=30)
    with api.client() as client:
        first = submit(client)
        made = clone(client, first, {}, **{"idempotency-key": "k"}).json()["id"]
        assert made != first, "a clone without changes is a job of its own"
        again = clone(client, first, {}, **{"idempotency-key": "k"})
        assert again.json()["id"] == made and again.headers["idempotent-replayed"] == "true"
        assert clone(client, first, {"seed": 7}, **{"idempotency-key": "k"}).status_code == 409
        assert client.post("/jobs", json=SPEC, headers={"idempotency-key": "k"}).status_code == 409
        by_itself = clone(client, first, {"seed": 8}).json()["id"]
        assert clone(client, first, {"seed": 8}).json()["id"] == by_itself


def test_jobs_are_found_by_model_and_age(any_api: Api) -> None:
    with any_api.client() as client:
        old, new = submit(client), submit(client)
        with any_api.context.write() as session:
            an_hour_ago = {"created_at": JobRow.created_at - 3600}
            session.execute(update(JobRow).where(JobRow.id == old).values(an_hour_ago))

        def found(**params: str) -> list[str]:
            answer = client.get("/jobs", params=params)
            assert answer.status_code == 200, answer.text
            return [job["id"] for job in answer.json()["data"]]

        since = client.get(f"/jobs/{new}").json()["created_at"]
        assert found(created_after=since) == [new] and found(created_before=since) == [old]
        assert found(model=BASE) == [new, old] and found(model="other") == []
        assert found(model=BASE, created_before=since, status="queued") == []
        for wrong in ({"created_after": "yesterday"}, {"created_after": "2026-11-01T00:00:00"}, {"model": "a\x00"}):
            assert client.get("/jobs", params=wrong).status_code == 400


def test_many_jobs_are_cancelled_and_each_is_told(any_api: Api) -> None:
    with any_api.client() as client:
        ended = submit(client)
        finish(any_api.context, drive(any_api.context, ended))
        running = submit(client)
        drive(any_api.context, running)
        waiting, gone = submit(client), submit(client)
        client.post(f"/jobs/{gone}/cancel")
        ids = [waiting, running, ended, gone, "job_absent", waiting]
        would = client.post("/jobs/cancel", json={"ids": ids, "dry_run": True}).json()
        results = ["cancelled", "cancelling", "ended", "already_cancelled", "not_found"]
        assert [item["result"] for item in would["data"]] == results and would["dry_run"]
        assert client.get(f"/jobs/{waiting}").json()["status"] == "validating", "nothing was done"
        did = client.post("/jobs/cancel", json={"ids": ids}).json()
        assert [item["result"] for item in did["data"]] == results
        assert [item["status"] for item in did["data"]] == ["cancelled", "running", "succeeded", "cancelled", None]
        assert client.get(f"/jobs/{running}").json()["desired"] == "cancel"
        again = client.post("/jobs/cancel", json={"ids": [running, waiting]}).json()["data"]
        assert [item["result"] for item in again] == ["cancelling", "already_cancelled"]


def test_jobs_are_cancelled_by_a_filter(any_api: Api) -> None:
    with any_api.client() as client, any_api.client(any_api.new_key("other")) as stranger:
        red = [submit(client, metadata={"team": "red"}) for _ in range(5)]
        blue, foreign = submit(client, metadata={"team": "blue"}), submit(stranger, metadata={"team": "red"})
        body = {"filter": {"status": ["validating"], "metadata": {"team": "red"}}, "limit": 2}
        seen, after = [], None
        while True:
            page = client.post("/jobs/cancel", json=body | ({"after": after} if after else {})).json()
            seen += [item["id"] for item in page["data"]]
            after = page["next"]
            if not page["has_more"]:
                break
        assert seen == red[::-1] or sorted(seen) == sorted(red)
        assert {client.get(f"/jobs/{job}").json()["status"] for job in red} == {"cancelled"}
        assert client.get(f"/jobs/{blue}").json()["status"] == "validating"
        assert stranger.get(f"/jobs/{foreign}").json()["status"] == "validating"
        hers = stranger.post("/jobs/cancel", json={"ids": [blue]}).json()["data"]
        assert [item["result"] for item in hers] == ["not_found"]
        assert client.get(f"/jobs/{blue}").json()["status"] == "validating"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"filter": {}},
        {"filter": {"metadata": {}}},
        {"filter": {"model": None}},
        {"filter": {"status": []}},
        {"filter": {"status": ["succeeded"]}},
        {"filter": {"metadata": {"a\0b": "c"}}},
        {"ids": []},
        {"ids": ["a"], "filter": {"status": ["queued"]}},
        {"ids": ["a"], "after": "b"},
        {"ids": ["a"] * 1001},
    ],
)
def test_what_could_mean_everything_is_refused(client: httpx2.Client, body: dict) -> None:
    job_id = submit(client)
    answer = client.post("/jobs/cancel", json=body)
    assert answer.status_code == 400 and answer.json()["detail"], answer.text
    assert client.get(f"/jobs/{job_id}").json()["status"] == "validating"


def test_many_at_once_by_several(any_api: Api) -> None:
    """Overlapping wishes in other orders neither block each other nor cancel a job twice."""
    with any_api.client() as client:
        ids = [submit(client, seed=number) for number in range(60)]

    def cancel(order: int) -> list[str]:
        with any_api.client() as mine:
            return [item["result"] for item in mine.post("/jobs/cancel", json={"ids": ids[::order]}).json()["data"]]

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        results = [result for found in pool.map(cancel, (1, -1)) for result in found]
    assert time.monotonic() - began < 30
    assert results.count("cancelled") == results.count("already_cancelled") == 60


def test_a_clone_counts_to_the_quota(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    client.put("/quota", json={"max_queued": 1})
    refused = clone(client, job_id, {})
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_queued") and refused.headers["retry-after"]
