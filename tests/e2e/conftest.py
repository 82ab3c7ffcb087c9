"""The whole service as a user starts it: `tunery up`, real processes, the real trainer on a tiny random Llama.

It runs twice: over the embedded stack, and over a Postgres, a Redis and an S3 whose addresses stand in the environment.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from common.client import Tunery
from tests.processes import Process, wait_until
from tests.servers import S3
from tests.worker.trainer.tiny import build_base

LEASE_S = 10.0


@dataclass
class Service:
    """A running installation: its client, its process, and where it keeps things."""

    client: Tunery
    process: Process
    data_dir: Path
    variables: dict[str, str]

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the running processes of this installation whose command line holds `word`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that can be trained, one of pickles, and one that wants code of its own."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny").mkdir()
    build_base(folder / "tiny")
    (folder / "tiny" / "tunery.json").write_text(json.dumps({"id": "example/tiny", "revision": "c0ffee"}))
    for name, config in {"pickled": {}, "remote-code": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}}.items():
        (folder / name).mkdir()
        known = json.loads((folder / "tiny" / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(known | config))
        (folder / name / "tokenizer.json").write_text((folder / "tiny" / "tokenizer.json").read_text())
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "remote-code" / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module", params=["embedded", "addresses"])
def service(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A running service with two workers; nothing of it is left afterwards."""
    folder = tmp_path_factory.mktemp(request.param)
    variables = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1",
        "TUNERY_MODEL_DIR": str(models), "TUNERY_LEASE_S": str(LEASE_S), "TUNERY_RETRY_MAX_S": "1",
    }  # fmt: skip
    if request.param == "addresses":
        variables |= addresses(request)
    process = Process("up", ["common.cli", "--data-dir", str(folder / "data"), "up", "--port", "0", "--workers", "2"],
                      variables, folder / "up.log")  # fmt: skip
    try:
        process.wait_for("Tunery listens on", 120)
        known = json.loads((folder / "data" / "up.json").read_text())
        with Tunery(url=known["url"], api_key=(folder / "data" / "api-key").read_text().strip()) as client:
            wait_until(lambda: len(client.workers.list().data) >= 3, 60, "the workers")
            yield Service(client, process, folder / "data", variables)
        left = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.end()
    assert process.wait() == 0, process.said()
    assert not [child for child in left if child.is_running()], "processes are left behind"


def addresses(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return what an operator sets: the addresses of a database, a broker and a store, and credentials."""
    s3: S3 = request.getfixturevalue("s3")
    return {
        "TUNERY_DATABASE_URL": request.getfixturevalue("module_postgres_url"),
        "TUNERY_BROKER_URL": request.getfixturevalue("valkey_url"),
        "TUNERY_BROKER_PREFIX": f"e2e-{uuid.uuid4().hex}",
        "TUNERY_S3_ENDPOINT_URL": s3.endpoint_url,
        "TUNERY_S3_ACCESS_KEY_ID": s3.access_key_id,
        "TUNERY_S3_SECRET_ACCESS_KEY": s3.secret_access_key,
        "TUNERY_S3_BUCKET": s3.new_bucket(),
    }


@pytest.fixture(scope="module")
def module_postgres_url(postgres_server: str) -> str:
    """An empty database that lasts for the module."""
    from sqlalchemy import create_engine, text

    # A process runs several modules, over one server.
    name = f"e2e_{uuid.uuid4().hex}"
    admin = create_engine(postgres_server.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return postgres_server.format(name)
