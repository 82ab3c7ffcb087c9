"""Parts of the installation that are away."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest
from pydantic import SecretStr

from api.app import create_app
from common import context
from common.settings import Settings
from tests.api.conftest import SPEC, Api, served


@pytest.fixture
def frozen_port() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def dead_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_job_is_taken_while_the_broker_is_frozen(
    start: Callable[..., Api], sqlite_url: str, frozen_port: int
) -> None:
    api = start(sqlite_url, broker_url=SecretStr(f"redis://127.0.0.1:{frozen_port}/0"))
    with api.client() as client:
        began = time.monotonic()
        answer = client.post("/jobs", json=SPEC)
        assert answer.status_code == 201 and time.monotonic() - began < 6
        assert client.get(f"/jobs/{answer.json()['id']}").json()["status"] == "validating"
        ready = client.get("/readyz")
        assert ready.status_code == 200 and not ready.json()["checks"]["broker"]["ok"]
        assert any(warning.startswith("broker") for warning in ready.json()["warnings"])


def test_a_database_that_is_away(settings: Settings, dead_port: int) -> None:
    url = f"postgresql+psycopg://x:very-secret@127.0.0.1:{dead_port}/x"
    parts = context.build(settings.model_copy(update={"database_url": url}))
    with served(create_app(parts)) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        answer = client.get("/jobs", headers={"authorization": "Bearer x"})
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["code"] == "database_away" and "very-secret" not in answer.text
        ready = client.get("/readyz")
        assert ready.status_code == 503 and not ready.json()["checks"]["database"]["ok"]
        assert "very-secret" not in ready.text
        assert client.get("/livez").status_code == 200
    parts.close()


def test_a_database_of_another_version(settings: Settings, empty_sqlite_url: str) -> None:
    parts = context.build(settings.model_copy(update={"database_url": empty_sqlite_url}))
    with served(create_app(parts)) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 503 and "python -m migrations" in ready.json()["checks"]["migration"]["detail"]
    parts.close()


@pytest.mark.parametrize("database", ["sqlite_url", "postgres_url"])
def test_a_schema_that_is_older_than_the_code(
    start: Callable[..., Api], database: str, request: pytest.FixtureRequest
) -> None:
    api = start(request.getfixturevalue(database))
    with api.client() as client:
        with api.context.sessions.engine.begin() as connection:
            connection.exec_driver_sql("alter table jobs rename column priority to urgency")
        answer = client.get("/jobs")
        assert (answer.status_code, answer.json()["code"]) == (503, "schema_outdated"), answer.text
        assert "python -m migrations" in answer.json()["hint"]
        answer = client.get("/v1/fine_tuning/jobs")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "schema_outdated"), answer.text


def test_a_store_that_is_away(start: Callable[..., Api], sqlite_url: str, dead_port: int) -> None:
    api = start(sqlite_url, s3_endpoint_url=f"http://127.0.0.1:{dead_port}")
    with api.client() as client:
        answer = client.post("/datasets", files={"file": ("a", b"x")})
        assert answer.status_code == 503 and answer.json()["code"] == "store_away"
        assert client.get("/datasets").json()["data"] == [], "no row without its object"
        job_id = client.post("/jobs", json=SPEC).json()["id"]
        client.post(f"/jobs/{job_id}/cancel")
        assert client.delete(f"/jobs/{job_id}").status_code == 503
        assert client.get(f"/jobs/{job_id}").status_code == 200, "it can be deleted once more"
        assert client.get("/readyz").status_code == 503


def test_an_unexpected_error_tells_nothing_but_its_id(
    api: Api, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("very-secret")

    monkeypatch.setattr("common.jobs.queries.page", fail)
    answer = client.get("/jobs", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500 and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert "very-secret" not in answer.text
    assert any("mine-1" in record.getMessage() and record.exc_info for record in caplog.records)
