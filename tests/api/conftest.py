"""A real API over a real database, broker and object store."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from api.__main__ import Server
from api.app import create_app
from api.watching import Watcher
from common import context, keys
from common.context import Context
from common.jobs import lifecycle
from common.settings import Settings
from common.storage import keys as object_keys
from tests.servers import S3
from tests.worker.trainer.tiny import build_base
from worker.preflight import Preflight
from worker.supervisor import Supervisor
from worker.workplace import Device, Workplace

BASE = "tiny-base"


@dataclass(frozen=True)
class Api:
    """A running API: its context, its address, and an administrator's key of the tenant `default`."""

    context: Context
    url: str
    key: str
    watcher: Watcher

    def client(self, key: str | None = None) -> httpx2.Client:
        headers = {"authorization": f"Bearer {self.key if key is None else key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def new_key(self, tenant: str = "default", *, admin: bool = False) -> str:
        with self.context.write() as session:
            return keys.create(session, name="test", tenant=tenant, admin=admin)[1]


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve the API on a free port from a thread and yield its address."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = Server(app, config)
    listening = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
        assert not thread.is_alive(), "the API did not stop"


@pytest.fixture
def settings(tmp_path: Path, s3: S3, valkey_url: str) -> Settings:
    """Settings of an installation without a database yet: a bucket, a broker, one base model."""
    base = tmp_path / "models" / BASE
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "tunery.json").write_text('{"id": "org/tiny-base", "revision": "abc"}')
    (base / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "local").mkdir()
    return Settings(
        broker_url=valkey_url,
        broker_prefix=f"test-{uuid.uuid4().hex[:8]}",
        s3_endpoint_url=s3.endpoint_url,
        s3_access_key_id=s3.access_key_id,
        s3_secret_access_key=s3.secret_access_key,
        s3_bucket=s3.new_bucket(),
        dataset_buckets=["datasets"],
        model_dir=tmp_path / "models",
        local_datasets=tmp_path / "local",
        max_upload_bytes=3 * 2**20,
        # Most tests submit the same job many times and mean it.
        repeat_window_s=0,
    )


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[..., Api]]:
    """Start an API over the database at a URL; other settings may be given by name."""
    with ExitStack() as stack:

        def started(database_url: str, **values: Any) -> Api:
            made = settings.model_copy(update={"database_url": database_url, **values})
            parts = context.build(made)
            stack.callback(parts.close)
            app = create_app(parts)
            api = Api(parts, stack.enter_context(served(app)), "", app.state.watcher)
            return replace(api, key=api.new_key(admin=True))

        yield started


@pytest.fixture
def api(start: Callable[..., Api], sqlite_url: str) -> Api:
    """An API over a fresh SQLite."""
    return start(sqlite_url)


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def any_api(start: Callable[..., Api], request: pytest.FixtureRequest) -> Api:
    """An API over a fresh SQLite, then one over a fresh Postgres."""
    return start(request.getfixturevalue(request.param))


@pytest.fixture
def client(api: Api) -> Iterator[httpx2.Client]:
    """An administrator's client of `api`."""
    with api.client() as made:
        yield made


def drive(parts: Context, job_id: str) -> lifecycle.Claim:
    """Let the job pass its check and be claimed, as workers do."""
    with parts.write() as session:
        check = lifecycle.claim_preflight(session, "p", 60)
        assert check is not None and check.job_id == job_id
        lifecycle.accept(session, check, base_id="b", base_revision=None, dataset_sha256="0" * 64, report={})
    with parts.write() as session:
        claim = lifecycle.claim(session, "w", 60)
        assert claim is not None and claim.job_id == job_id
    return claim


def finish(parts: Context, claim: lifecycle.Claim) -> None:
    """Publish an empty adapter."""
    key = object_keys.attempt(claim.tenant, claim.job_id, claim.epoch) + object_keys.MANIFEST
    artifact = {"name": object_keys.MANIFEST, "key": key, "bytes": 2, "sha256": "0" * 64}
    parts.store.put_bytes(key, b"{}")
    with parts.write() as session:
        lifecycle.publish(session, claim, lifecycle.Published(key, "0" * 64, [artifact]), {})


SPEC: dict[str, Any] = {"model": BASE, "dataset": "https://example.com/train.jsonl"}


@pytest.fixture
def worker(api: Api, tmp_path: Path) -> Iterator[Supervisor]:
    """A preflight worker that works when it is told to, and a base model that it can read."""
    (tmp_path / "models" / "llama").mkdir()
    build_base(tmp_path / "models" / "llama")
    made = Supervisor(api.context, Preflight(), Workplace(api.context.settings), Device("cpu"))
    yield made
    made.close()
