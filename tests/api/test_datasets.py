"""Uploads: one object for each content, removed with the last name for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2

from tests.api.conftest import SPEC, Api


def upload(client: httpx2.Client, content: bytes = b'{"text": "a"}\n', name: str = "train.jsonl") -> httpx2.Response:
    return client.post("/datasets", files={"file": (name, content)})


def test_one_object_for_each_content(any_api: Api) -> None:
    with any_api.client() as client:
        first = upload(client)
        assert first.status_code == 201 and first.headers["location"] == f"/datasets/{first.json()['id']}"
        again = upload(client)
        assert again.status_code == 200 and again.json() == first.json()
        other_name = upload(client, name="b.jsonl").json()
        digest = hashlib.sha256(b'{"text": "a"}\n').hexdigest()
        assert other_name["sha256"] == digest and other_name["id"] != first.json()["id"]
        assert [item.key for item in any_api.context.store.objects("default/datasets/")] == [
            f"default/datasets/{digest}"
        ]
        assert client.get(f"/datasets/{other_name['id']}").json() == other_name
        page = client.get("/datasets", params={"limit": 1}).json()
        assert page["data"] == [other_name] and page["has_more"]
        assert client.get("/datasets", params={"after": page["next"]}).json()["data"] == [first.json()]

        assert client.delete(f"/datasets/{other_name['id']}").status_code == 204
        assert list(any_api.context.store.objects("default/datasets/")), "another name still needs the object"
        assert client.delete(f"/datasets/{first.json()['id']}").status_code == 204
        assert not list(any_api.context.store.objects("default/datasets/"))
        assert client.delete(f"/datasets/{first.json()['id']}").status_code == 404


def test_a_dataset_stays_while_a_job_needs_it(any_api: Api) -> None:
    with any_api.client() as client:
        dataset = upload(client).json()
        job = client.post("/jobs", json={**SPEC, "validation_dataset": dataset["uri"]}).json()
        refused = client.delete(f"/datasets/{dataset['id']}")
        assert refused.status_code == 409 and job["id"] in refused.json()["detail"]
        client.post(f"/jobs/{job['id']}/cancel")
        assert client.delete(f"/datasets/{dataset['id']}").status_code == 204


def test_uploads_and_deletes_at_once_leave_a_row_with_its_object(any_api: Api) -> None:
    def churn(number: int) -> None:
        with any_api.client() as client:
            for turn in range(4):
                dataset = upload(client, name=f"{number}-{turn}.jsonl").json()
                assert client.delete(f"/datasets/{dataset['id']}").status_code == 204
            upload(client, name=f"{number}.jsonl")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    with any_api.client() as client:
        assert len(client.get("/datasets").json()["data"]) == 4
    assert len(list(any_api.context.store.objects("default/datasets/"))) == 1


def test_a_large_upload_arrives_whole(start: Callable[..., Api], sqlite_url: str) -> None:
    api = start(sqlite_url, max_upload_bytes=40 * 2**20)
    content = b"x" * (33 * 2**20 + 1)
    with api.client() as client:
        dataset = upload(client, content).json()
    assert dataset["bytes"] == len(content) and dataset["sha256"] == hashlib.sha256(content).hexdigest()
    assert api.context.store.size(f"default/datasets/{dataset['sha256']}") == len(content)


def test_strangers_store_nothing(api: Api) -> None:
    answer = httpx2.post(f"{api.url}/datasets", files={"file": ("a", b"x" * 2**21)}, trust_env=False)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert not list(api.context.store.objects("default/"))
