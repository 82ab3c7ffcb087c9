"""Whatever belongs to another tenant does not exist."""

from __future__ import annotations

import pytest
from fastapi.routing import APIRoute

from api.auth import AuthenticatedRoute
from api.routes import adapters, base_models, datasets, history, jobs, keys, quota, workers
from tests.api.conftest import SPEC, Api, drive, finish

ROUTES = [
    route
    for module in (jobs, history, adapters, datasets, base_models, workers, keys, quota)
    for route in module.router.routes
    if isinstance(route, APIRoute)
]
PLAIN = {"POST /jobs", "GET /jobs", "POST /datasets", "GET /datasets", "GET /base-models", "GET /workers"}
OWN = {"POST /keys", "GET /keys", "GET /quota", "PUT /quota"}
BODIES = {"PATCH /jobs/{job_id}": {"priority": 1}}


def called(route: APIRoute) -> str:
    return f"{min(route.methods)} {route.path}"


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
    return {"job_id": job["id"], "dataset_id": dataset["id"], "key_id": key["id"]}


def test_every_route_with_another_tenants_key(any_api: Api, foreign: dict[str, str]) -> None:
    walked = set()
    with any_api.client(any_api.new_key("stranger")) as client:
        for route in ROUTES:
            if "worker_id" in route.path or called(route) in PLAIN | OWN:
                continue
            body = BODIES.get(called(route))
            answer = client.request(min(route.methods), route.path.format(**foreign), json=body)
            assert answer.status_code == 404, f"{called(route)}: {answer.status_code}"
            walked.add(called(route))
        for path in ("/jobs", "/datasets"):
            assert client.get(path).json()["data"] == []
        assert [key["tenant"] for key in client.get("/keys").json()["data"]] == ["stranger"]
        stolen = client.post("/jobs", json={**SPEC, "dataset": f"dataset:{foreign['dataset_id']}"})
        assert stolen.status_code == 400 and stolen.json()["param"] == "dataset"
    assert len(walked) >= 13
    with any_api.client() as client:
        assert client.get(f"/jobs/{foreign['job_id']}").status_code == 200
        assert client.get(f"/datasets/{foreign['dataset_id']}").status_code == 200
