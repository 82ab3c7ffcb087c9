"""An installation whose trainer is the hash chain of tests/faults: these tests are about the worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common import context as contexts
from common.context import Context
from common.db.rows import DatasetRow, JobRow
from common.ids import new_id
from common.jobs import lifecycle, queries
from common.schemas.jobs import JobSpec
from common.settings import Settings
from common.storage.store import sha256_of
from worker.preflight import Preflight
from worker.supervisor import Supervisor
from worker.training import Training
from worker.workplace import Device, Workplace

TENANT = "t"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _tests_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children find the modules of tests/faults."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def bench_database_url(sqlite_url: str) -> str:
    """The database of these tests; a test that wants another one says so."""
    return sqlite_url


@pytest.fixture
def context(make_settings: Callable[..., Settings], bench_database_url: str, tmp_path: Path) -> Iterator[Context]:
    """An installation with the hash trainer and a base model of one file."""
    base = tmp_path / "models" / "tiny"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_text("")
    (base / "tunery.json").write_text(json.dumps({"id": "org/tiny", "revision": "c0ffee"}))
    settings = make_settings(
        bench_database_url, trainer_module="tests.faults.hash_trainer", preflight_module="tests.faults.hash_check",
        lease_s=12.0, retry_max_s=0.0, stop_grace_s=20.0,
    )  # fmt: skip
    made = contexts.build(settings)
    yield made
    made.close()


class Bench:
    """Submits jobs and works them off in this process."""

    def __init__(self, context: Context, tmp_path: Path):
        self.context = context
        self._tmp = tmp_path
        self.supervisors: list[Supervisor] = []

    def dataset(self, text: str = '{"text": "a"}\n{"text": "b"}\n') -> str:
        """Upload a dataset and return its URI."""
        path = self._tmp / f"{new_id('file')}.jsonl"
        path.write_text(text)
        dataset_id, key = new_id("ds"), f"{TENANT}/datasets/{new_id('x')}"
        self.context.store.put_file(key, path)
        with self.context.write() as session:
            session.add(
                DatasetRow(id=dataset_id, tenant=TENANT, name="train.jsonl", key=key, bytes=path.stat().st_size,
                           sha256=sha256_of(path), created_at=time.time())
            )  # fmt: skip
        return f"dataset:{dataset_id}"

    def submit(
        self, dataset: str | None = None, *, steps: int = 6, method: str = "qlora", model: str = "tiny",
        spec: dict[str, Any] | None = None, **metadata: object,
    ) -> str:  # fmt: skip
        """Submit a job of so many steps whose metadata tells the hash trainer what to do."""
        spec = JobSpec.model_validate(
            {"model": model, "dataset": dataset or self.dataset(), "hyperparameters": {"max_steps": steps},
             "method": method, "metadata": {name: str(value) for name, value in metadata.items()}}
            | (spec or {})
        )  # fmt: skip
        with self.context.write() as session:
            return lifecycle.submit(session, TENANT, spec)

    def supervisor(self, kind: str = "train") -> Supervisor:
        """Return a new worker of a kind, as a process would have it."""
        work = Training() if kind == "train" else Preflight()
        made = Supervisor(self.context, work, Workplace(self.context.settings), Device("cpu"))
        self.supervisors.append(made)
        return made

    def check(self) -> None:
        """Let a preflight worker work off what waits."""
        self.supervisor("preflight").work_off()

    def train(self) -> None:
        """Let a GPU worker work off what waits."""
        self.supervisor().work_off()

    def start(self, supervisor: Supervisor | None = None) -> tuple[Supervisor, threading.Thread]:
        """Let a worker work in the background."""
        made = supervisor or self.supervisor()
        thread = threading.Thread(target=made.work_off)
        thread.start()
        return made, thread

    def row(self, job_id: str) -> JobRow:
        """Return the row of a job."""
        with self.context.read() as session:
            return queries.row(session, TENANT, job_id)

    def events(self, job_id: str) -> list[str]:
        """Return the names of a job's events."""
        with self.context.read() as session:
            return [event.name for event in queries.events(session, job_id, limit=1000).data]

    def wait(self, job_id: str, seen: Callable[[JobRow], bool], timeout_s: float = 30.0) -> JobRow:
        """Wait until `seen` holds for the row of a job."""
        deadline = time.monotonic() + timeout_s
        while not seen(row := self.row(job_id)):
            assert time.monotonic() < deadline, f"{row.status} at step {row.step}: {self.events(job_id)}"
            threading.Event().wait(0.02)
        return row

    def adapter(self, job_id: str) -> bytes:
        """Return the published adapter of a job."""
        prefix = self.row(job_id).manifest_key.removesuffix("manifest.json")
        return self.context.store.get_bytes(f"{prefix}adapter/adapter_model.safetensors")


@pytest.fixture
def bench(context: Context, tmp_path: Path) -> Iterator[Bench]:
    """A bench over the installation; no trainer survives it."""
    made = Bench(context, tmp_path)
    yield made
    for supervisor in made.supervisors:
        supervisor.draining.set()
        supervisor.close()
