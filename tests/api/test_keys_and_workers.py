"""Keys, workers and base models."""

from __future__ import annotations

import httpx2

from common import workers
from common.workers import Beat
from tests.api.conftest import SPEC, Api, drive


def test_a_key_is_shown_once_and_ends_at_once(any_api: Api) -> None:
    with any_api.client() as client:
        made = client.post("/keys", json={"name": "laptop"}).json()
        assert made["tenant"] == "default" and made["key"].startswith(made["hint"].rstrip("…"))
        with any_api.client(made["key"]) as other:
            assert other.get("/jobs").status_code == 200
            listed = client.get("/keys").json()["data"]
            assert all("key" not in key for key in listed)
            assert next(key for key in listed if key["id"] == made["id"])["last_used_at"]
            assert client.delete(f"/keys/{made['id']}").status_code == 204
            refused = other.get("/jobs")
        assert refused.status_code == 401 and refused.json()["code"] == "unauthenticated"
        assert "TUNERY_API_KEY" in refused.json()["hint"]
        assert client.delete("/keys/key_none").status_code == 404


def test_only_administrators_name_another_tenant(api: Api, client: httpx2.Client) -> None:
    made = client.post("/keys", json={"name": "k", "tenant": "acme"}).json()
    assert made["tenant"] == "acme"
    assert [key["id"] for key in client.get("/keys", params={"tenant": "acme"}).json()["data"]] == [made["id"]]
    with api.client(made["key"]) as acme:
        refused = acme.post("/keys", json={"name": "k", "tenant": "default"})
        assert refused.status_code == 403 and refused.json()["param"] == "tenant"
        assert acme.post("/keys", json={"name": "k", "tenant": "acme"}).status_code == 201
        assert acme.get("/keys", params={"tenant": "default"}).status_code == 403
        assert acme.post("/workers/w/drain").status_code == 403
    assert client.delete(f"/keys/{made['id']}", params={"tenant": "acme"}).status_code == 204


def beat(api: Api, **values: object) -> None:
    known = {"id": "w", "name": "host", "kind": "train", "device": "cpu", "device_name": None, "vram_bytes": None}
    with api.context.write() as session:
        workers.beat(session, Beat(**{**known, "state": "idle", **values}))


def test_workers_are_listed_drained_and_missed(api: Api, client: httpx2.Client) -> None:
    job = client.post("/jobs", json=SPEC).json()["id"]
    drive(api.context, job)
    beat(api, state="busy", job_id=job, base_model="org/held")
    beat(api, id="p", kind="preflight")
    shown = {worker["id"]: worker for worker in client.get("/workers").json()["data"]}
    assert shown["w"]["job"] == job and shown["w"]["base_model"] == "org/held" and shown["p"]["state"] == "idle"
    with api.client(api.new_key("other")) as other:
        assert [worker["job"] for worker in other.get("/workers").json()["data"]] == [None, None]
    assert client.get("/readyz").json()["warnings"] == []
    assert client.post("/workers/w/drain").json()["state"] == "draining"
    with api.context.write() as session:
        assert workers.beat(session, Beat("w", "host", "train", "cpu", None, None, "busy")) == "drain"
        workers.leave(session, "p")
    states = {worker["id"]: worker["state"] for worker in client.get("/workers").json()["data"]}
    assert states == {"w": "draining", "p": "gone"}
    assert client.post("/workers/none/drain").status_code == 404


def test_base_models_of_folders_and_workers(api: Api, client: httpx2.Client) -> None:
    beat(api, base_model="org/held")
    beat(api, id="v", base_model="org/tiny-base")
    models = client.get("/base-models").json()["data"]
    assert models == [
        {"id": "tiny-base", "name": "org/tiny-base", "revision": "abc", "source": "folder", "bytes": 5},
        {"id": "org/held", "name": "org/held", "revision": None, "source": "worker", "bytes": None},
    ]
