"""Whatever belongs to another tenant does not exist."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute

from api.auth import AuthenticatedRoute
from api.openai import files as openai_files
from api.openai import uploads as openai_uploads
from api.routes import adapters, base_models, datasets, history, jobs, keys, quota, uploads, webhooks, workers
from tests.api.conftest import SPEC, Api, drive, finish

NATIVE = (jobs, history, adapters, datasets, uploads, base_models, workers, keys, quota, webhooks)
OPENAI = (openai_files, openai_uploads)
ROUTES = [route for module in NATIVE + OPENAI for route in module.router.routes if isinstance(route, APIRoute)]
OPENAI_ROUTES = [route for module in OPENAI for route in module.router.routes]
PLAIN = {"POST /jobs", "GET /jobs", "POST /datasets", "GET /datasets", "GET /base-models", "GET /workers"}
PLAIN |= {"POST /jobs/cancel", "POST /jobs/estimate", "POST /v1/files", "GET /v1/files", "POST /v1/uploads"}
PLAIN |= {"POST /uploads"}
BODIES: dict[str, dict[str, Any]] = {
    "PATCH /jobs/{job_id}": {"json": {"priority": 1}},
    "POST /jobs/{job_id}/clone": {"json": {}},
    "PATCH /webhooks/{webhook_id}": {"json": {"enabled": False}},
    "POST /jobs/{job_id}/export": {"json": {}},
    "GET /datasets/{dataset_id}/preview": {"params": {"model": "tiny-base"}},
    "POST /datasets/{dataset_id}/preview": {"json": {"model": "tiny-base"}},
    "POST /v1/uploads/{upload_id}/parts": {"files": {"data": ("a", b"x")}},
    "POST /v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["p"]}},
}
OWN = {"POST /keys", "GET /keys", "GET /quota", "PUT /quota", "POST /webhooks", "GET /webhooks"}


def called(route: APIRoute) -> str:
    return f"{min(route.methods)} {path_of(route)}"


def path_of(route: APIRoute) -> str:
    return f"/v1{route.path}" if route in OPENAI_ROUTES else route.path


def test_every_route_asks_for_a_key() -> None:
    assert all(isinstance(route, AuthenticatedRoute) for route in ROUTES)


@pytest.fixture
def foreign(any_api: Api) -> dict[str, str]:
    """Ids of things of the tenant `default`, by the name of the path's parameter."""
    with any_api.client() as client:
        dataset = client.post("/datasets", files={"file": ("a", b"x")}).json()
        job = client.post("/jobs", json={**SPEC, "dataset": dataset["uri"]}).json()
        finish(any_api.context, drive(any_api.context, job["id"]))
        key = client.post("/keys", json={"name": "k"}).json()
        webhook = client.post("/webhooks", json={"url": "https://example.com/hook"}).json()
        delivery = client.post(f"/webhooks/{webhook['id']}/ping").json()
        announced = {"purpose": "fine-tune", "filename": "a", "bytes": 1, "mime_type": ""}
        upload = client.post("/v1/uploads", json=announced).json()
        direct = client.post("/uploads", json={"name": "a", "bytes": 1, "sha256": "0" * 64}).json()
    return {
        "job_id": job["id"],
        "dataset_id": dataset["id"],
        "key_id": key["id"],
        "file_id": dataset["id"],
        "upload_id": upload["id"],
        "direct_id": direct["id"],
        "webhook_id": webhook["id"],
        "delivery_id": delivery["id"],
    }


def test_every_route_with_another_tenants_key(any_api: Api, foreign: dict[str, str]) -> None:
    walked = set()
    with any_api.client(any_api.new_key("stranger")) as client:
        for route in ROUTES:
            if "worker_id" in route.path or called(route) in PLAIN | OWN:
                continue
            body = BODIES.get(called(route), {})
            path = path_of(route)
            if path.startswith("/uploads"):
                path = path.replace("upload_id", "direct_id")
            answer = client.request(min(route.methods), path.format(**foreign), **body)
            assert answer.status_code == 404, f"{called(route)}: {answer.status_code}"
            walked.add(called(route))
        for path in ("/jobs", "/datasets", "/v1/files", "/webhooks"):
            assert client.get(path).json()["data"] == []
        assert [key["tenant"] for key in client.get("/keys").json()["data"]] == ["stranger"]
        for path in ("/jobs", "/jobs/estimate"):
            stolen = client.post(path, json={**SPEC, "dataset": f"dataset:{foreign['dataset_id']}"})
            assert stolen.status_code == 400 and stolen.json()["param"] == "dataset", path
    assert len(walked) >= 20
    with any_api.client() as client:
        assert client.get(f"/jobs/{foreign['job_id']}").status_code == 200
        assert client.get(f"/datasets/{foreign['dataset_id']}").status_code == 200
        assert client.get(f"/webhooks/{foreign['webhook_id']}").json()["enabled"]
        assert client.get(f"/uploads/{foreign['direct_id']}").json()["status"] == "pending"


def test_the_two_kinds_of_uploads_are_apart(any_api: Api, foreign: dict[str, str]) -> None:
    with any_api.client() as client:
        assert client.get(f"/uploads/{foreign['upload_id']}").status_code == 404
        assert client.post(f"/v1/uploads/{foreign['direct_id']}/cancel").status_code == 404
