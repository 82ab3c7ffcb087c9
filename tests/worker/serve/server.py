"""A server over a real database, a real store and a real model process, in this process; and jobs to be asked."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

import migrations
from common import context as contexts
from common import keys
from common.context import Context
from common.jobs import lifecycle
from common.keys import Caller
from common.schemas.jobs import JobSpec
from common.settings import Settings
from tests.servers import S3
from worker import publish
from worker.bases import Base
from worker.serve.app import create_app
from worker.serve.catalog import Adapter, JobCatalog
from worker.serve.model_process import ModelProcess
from worker.serve.protocol import ServeSpec
from worker.serve.service import Service
from worker.serve.shelf import Shelf
from worker.trainer.protocol import BaseRef, TrainSpec

BASE_ID, REVISION = "org/tiny", "c0ffee"


def installation(folder: Path, s3: S3, valkey_url: str) -> Context:
    """Return a migrated installation over SQLite in `folder`."""
    made = contexts.build(
        Settings(
            database_url=f"sqlite:///{folder / 'test.db'}",
            broker_url=valkey_url,
            broker_prefix=f"test-{uuid.uuid4().hex}",
            s3_endpoint_url=s3.endpoint_url,
            s3_access_key_id=s3.access_key_id,
            s3_secret_access_key=s3.secret_access_key,
            s3_bucket=s3.new_bucket(),
            work_dir=folder / "work",
            device="cpu",
        )
    )
    migrations.upgrade(made.sessions.engine)
    return made


def publish_job(context: Context, tenant: str, adapter: Path, *, base_id: str = BASE_ID, ended: bool = True) -> str:
    """Submit a job, and, if `ended`, let it succeed with the adapter in a folder; return its id."""
    spec = JobSpec(model="tiny", dataset="https://example.com/train.jsonl")
    with context.write() as session:
        job_id = lifecycle.submit(session, tenant, spec)
    if not ended:
        return job_id
    with context.write() as session:
        check = lifecycle.claim_preflight(session, "p", 60)
        assert check is not None and check.job_id == job_id, "an earlier job was never checked"
        lifecycle.accept(session, check, base_id=base_id, base_revision=REVISION, dataset_sha256="0" * 64, report={})
    with context.write() as session:
        claim = lifecycle.claim(session, "w", 60)
        assert claim is not None and claim.job_id == job_id
    out = adapter.parent / f"out-{job_id}"
    shutil.copytree(adapter, out / "adapter")
    train = TrainSpec(job_id, claim.epoch, spec.model_dump(), BaseRef("", base_id, REVISION), "train.jsonl", "0" * 64)
    with context.write() as session:
        lifecycle.publish(session, claim, publish.artifacts(context.store, claim, train, out, {}), {})
    return job_id


class CountingCatalog(JobCatalog):
    """The jobs of an installation, and which of them were fetched."""

    def __init__(self, context: Context, base: Base):
        super().__init__(context, base)
        self.fetched: list[str] = []

    def adapter(self, caller: Caller, job_id: str) -> Adapter:
        found = super().adapter(caller, job_id)

        def fetch(folder: Path) -> Path:
            self.fetched.append(job_id)
            return found.fetch(folder)

        return replace(found, fetch=fetch)


@dataclass
class Server:
    """A running server and its parts; a key for each tenant that was asked for."""

    url: str
    service: Service
    catalog: CountingCatalog
    process: ModelProcess
    shelf: Shelf
    context: Context
    keys: dict[str, str] = field(default_factory=dict)

    def key(self, tenant: str) -> str:
        """Return the tenant's key."""
        if tenant not in self.keys:
            with self.context.write() as session:
                self.keys[tenant] = keys.create(session, name="test", tenant=tenant)[1]
        return self.keys[tenant]

    def client(self, tenant: str | None = "t") -> httpx2.Client:
        headers = {}
        if tenant is not None:
            headers["authorization"] = f"Bearer {self.key(tenant)}"
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def ask(self, model: str, words: str = "the quick brown fox", *, tenant: str = "t", **options: Any) -> Any:
        """Ask one question and return the answer's body."""
        with self.client(tenant) as client:
            answer = client.post("/v1/chat/completions", json=question(model, words, **options))
            assert answer.status_code == 200, answer.text
            return answer.json()

    def text(self, model: str, words: str = "the quick brown fox", **options: Any) -> str:
        """Ask one question and return the answer's text."""
        return self.ask(model, words, **options)["choices"][0]["message"]["content"]


def question(model: str, words: str = "the quick brown fox", **options: Any) -> dict[str, Any]:
    """Return a body: the likeliest twelve tokens, unless it is said otherwise."""
    body = {"model": model, "messages": [{"role": "user", "content": words}], "temperature": 0, "max_tokens": 12}
    return body | options


def streamed(client: httpx2.Client, body: dict[str, Any]) -> list[Any]:
    """Return the documents of a stream; its end must be there."""
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@contextmanager
def serving(context: Context, base: Path, folder: Path, **changes: Any) -> Iterator[Server]:
    """Serve `base` on a free port, with changed settings."""
    settings = context.settings.model_copy(update=changes)
    spec = ServeSpec(
        BaseRef(str(base), BASE_ID, REVISION), "lora", {"bnb_4bit_compute_dtype": "float32"}, "cpu", 1,
        settings.serve_max_rows, settings.serve_max_batch_tokens, settings.serve_max_tokens,
    )  # fmt: skip
    folder.mkdir()
    process = ModelProcess(spec, folder, settings.serve_stall_s)
    shelf = Shelf(process, folder, settings.serve_max_adapters, settings.serve_max_adapter_bytes)
    served_base = Base(BASE_ID, REVISION)
    catalog = CountingCatalog(context, served_base)
    service = Service(served_base, catalog, process, shelf, settings)
    config = uvicorn.Config(create_app(service), port=0, log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Server(url, service, catalog, process, shelf, context)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"
