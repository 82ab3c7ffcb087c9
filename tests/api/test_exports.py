"""`POST /jobs/{id}/export`, and what a finished job shows of it."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from common.jobs import lifecycle
from common.storage import keys
from tests.api.conftest import SPEC, Api, drive, finish


@pytest.fixture
def source(api: Api, client: httpx2.Client) -> str:
    """A job that succeeded."""
    job_id: str = client.post("/jobs", json=SPEC | {"suffix": "bot"}).json()["id"]
    finish(api.context, drive(api.context, job_id))
    return job_id


def publish_merged(api: Api) -> str:
    """Work an export off as a worker does and return its id."""
    with api.context.write() as session:
        claim = lifecycle.claim(session, "w", 60)
        assert claim is not None
    prefix = keys.attempt(claim.tenant, claim.job_id, claim.epoch)
    files = []
    for name in ("merged/config.json", keys.MANIFEST):
        api.context.store.put_bytes(prefix + name, b"{}")
        files.append({"name": name, "key": prefix + name, "bytes": 2, "sha256": "0" * 64})
    with api.context.write() as session:
        report = {"merged": {"merged": {"made": True}}}
        lifecycle.publish(session, claim, lifecycle.Published(prefix + keys.MANIFEST, "0" * 64, files), report)
    return claim.job_id


def test_from_a_finished_job_to_its_merged_model(api: Api, client: httpx2.Client, source: str) -> None:
    asked = client.post(f"/jobs/{source}/export", json={"export": ["merged"], "priority": 2})
    made = asked.json()
    assert asked.status_code == 201 and asked.headers["location"] == f"/jobs/{made['id']}"
    assert (made["status"], made["source_job"], made["export"]) == ("queued", source, ["merged"])
    assert made["priority"] == 2 and made["position"] == 1 and made["waits_for"]["code"] == "no_worker"
    again = client.post(f"/jobs/{source}/export", json={})
    assert again.status_code == 200 and again.json()["id"] == made["id"]
    assert publish_merged(api) == made["id"]
    listed = client.get(f"/jobs/{source}/artifacts").json()["data"]
    assert [item["name"] for item in listed] == ["manifest.json", "merged/config.json"]
    assert httpx2.get(listed[1]["url"], trust_env=False).content == b"{}"
    assert client.get(f"/jobs/{made['id']}").json()["report"]["merged"]["merged"]["made"]
    assert client.get(f"/jobs/{source}").json()["source_job"] is None
    assert client.post(f"/jobs/{source}/export", json={}).json()["status"] == "succeeded"


def test_openais_clients_see_the_job_and_its_model_once(api: Api, client: httpx2.Client, source: str) -> None:
    made = client.post(f"/jobs/{source}/export", json={}).json()["id"]
    publish_merged(api)
    assert [job["id"] for job in client.get("/v1/fine_tuning/jobs").json()["data"]] == [source]
    models = [model["id"] for model in client.get("/v1/models").json()["data"] if model["id"].startswith("ft:")]
    assert len(models) == 1 and models[0].endswith(source)
    assert client.get(f"/v1/fine_tuning/jobs/{made}").json()["fine_tuned_model"] is None
    assert client.get(f"/v1/models/{made}").status_code == 404


def test_an_export_names_where_the_adapter_is(api: Api, client: httpx2.Client, source: str) -> None:
    made = client.post(f"/jobs/{source}/export", json={}).json()["id"]
    assert client.get(f"/jobs/{made}/adapter").status_code == 409
    cloned = client.post(f"/jobs/{made}/clone", json={})
    assert cloned.status_code == 409 and source in cloned.json()["hint"]
    publish_merged(api)
    for what in ("adapter", "precision"):
        answer = client.get(f"/jobs/{made}/{what}")
        assert answer.status_code == 409 and source in answer.json()["hint"]


def test_a_job_that_is_being_exported_is_not_deleted(api: Api, client: httpx2.Client, source: str) -> None:
    made = client.post(f"/jobs/{source}/export", json={}).json()["id"]
    refused = client.delete(f"/jobs/{source}")
    assert refused.status_code == 409 and refused.json()["code"] == "export_active"
    assert made in refused.json()["hint"]
    assert client.post(f"/jobs/{made}/cancel").json()["status"] == "cancelled"
    assert client.delete(f"/jobs/{source}").status_code == 204
    assert client.post(f"/jobs/{made}/retry").status_code == 404
    assert client.delete(f"/jobs/{made}").status_code == 204


def test_deleting_an_export_leaves_its_source(api: Api, client: httpx2.Client, source: str) -> None:
    client.post(f"/jobs/{source}/export", json={})
    made = publish_merged(api)
    assert client.delete(f"/jobs/{made}").status_code == 204
    assert [item["name"] for item in client.get(f"/jobs/{source}/artifacts").json()["data"]] == ["manifest.json"]
    assert client.post(f"/jobs/{source}/export", json={}).status_code == 201, "it can be made again"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"export": ["adapter"]}, "export"),
    "nothing": ({"export": []}, "export"),
    "twice": ({"export": ["merged", "merged"]}, "export"),
    "unknown key": ({"as": "merged"}, "as"),
    "priority": ({"priority": 1000}, "priority"),
}


@pytest.mark.parametrize(("body", "param"), BAD.values(), ids=BAD)
def test_bad_requests_name_the_field(client: httpx2.Client, source: str, body: dict[str, Any], param: str) -> None:
    answer = client.post(f"/jobs/{source}/export", json=body)
    assert answer.status_code == 400 and answer.json()["param"].startswith(param), answer.text
    assert len(client.get("/jobs").json()["data"]) == 1


def test_only_a_finished_adapter_is_exported(client: httpx2.Client) -> None:
    waiting = client.post("/jobs", json=SPEC).json()["id"]
    answer = client.post(f"/jobs/{waiting}/export", json={})
    assert answer.status_code == 409 and answer.json()["code"] == "cannot_export" and answer.json()["hint"]


def test_an_export_is_not_cloned_and_its_webhook_names_the_source(client: httpx2.Client, source: str) -> None:
    hook = client.post("/webhooks", json={"url": "https://example.com/hook"}).json()["id"]
    made = client.post(f"/jobs/{source}/export", json={"export": ["merged"]}).json()["id"]
    refused = client.post(f"/jobs/{made}/clone", json={"suffix": "b"})
    assert (refused.status_code, refused.json()["code"]) == (409, "cannot_clone") and source in refused.json()["hint"]
    [told] = client.get(f"/webhooks/{hook}/deliveries").json()["data"]
    assert (told["type"], told["job"], told["payload"]["data"]["source_job"]) == ("job.queued", made, source)
    assert client.post(f"/jobs/{source}/clone", json={"suffix": "b"}).status_code == 201
