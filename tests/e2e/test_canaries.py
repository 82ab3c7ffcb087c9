"""Secrets of an installation, each a word that occurs nowhere else: a whole run must not spread a single one.

Database, broker and store want passwords, the hub has a token, links to datasets and for parts of uploads are signed.
Jobs succeed, fail at the fetch and fail in the check. Then everything that the service wrote or showed is searched.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import psutil
import pytest

from common.client import Tunery
from common.embedded.children import Child, Children
from common.embedded.ports import free_ports
from common.embedded.valkey import Valkey
from common.errors import TuneryError
from tests.e2e.test_service import HYPERPARAMETERS, rows
from tests.processes import Process, wait_until
from tests.servers import S3
from tests.worker import peers


def canary(name: str) -> str:
    """Return a secret that is found nowhere by chance."""
    return f"canary-{name}-{uuid.uuid4().hex}"


@dataclass
class Installation:
    """A running service, the secrets in it, and what was seen of its children while they ran."""

    client: Tunery
    process: Process
    folder: Path
    secrets: dict[str, str]
    host: str
    s3: S3
    bucket: str
    children: dict[str, str] = field(default_factory=dict)
    command_lines: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Remember the command lines of every process, and the environments of those that run model code."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = "\n".join(process.cmdline())
                self.command_lines.add(line)
                if "worker.trainer" in line:
                    self.children[f"{line} {process.pid}"] = json.dumps(process.environ())
            except psutil.Error:
                continue


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An https server with datasets, as (host, file of its authority)."""
    folder = tmp_path_factory.mktemp("links")
    context, authority = peers.certificate(folder, "127.0.0.1")
    pages = {"/good.jsonl": rows().encode(), "/bad.jsonl": b'{"messages": 7}\n'}

    def answer(path: str, _: dict[str, str]) -> peers.Answer:
        found = pages.get(path.partition("?")[0])
        if path.startswith("/hop"):
            return peers.Answer(b"", 302, {"Location": "https://169.254.169.254" + path})
        return peers.Answer(found) if found else peers.Answer(b"", 403)

    with peers.serve(answer, context) as server:
        yield f"127.0.0.1:{server.server_port}", authority


@pytest.fixture(scope="module")
def broker(children: Children, server_dir: Path) -> tuple[str, str]:
    """A Valkey that wants a password, as (address, password)."""
    password, port = canary("broker"), free_ports(1)[0]
    server = Valkey(server_dir / "locked", server_dir / "locked.sock")
    secret = server_dir / "locked.conf"
    secret.write_text(f"requirepass {password}\n")
    argv = list(server.argv())
    argv[argv.index("--port") + 1] = str(port)
    child = Child("locked", (argv[0], str(secret), *argv[1:]), {"PATH": os.environ["PATH"]}, server_dir / "locked.log")
    children.start(child, lambda: (server_dir / "locked.sock").exists())
    return f"redis://:{password}@127.0.0.1:{port}/0", password


@pytest.fixture(scope="module")
def installation(
    models: Path,
    links: tuple[str, Path],
    broker: tuple[str, str],
    s3: S3,
    module_postgres_url: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installation]:
    """A running service whose every part has a secret."""
    folder = tmp_path_factory.mktemp("canaries")
    host, authority = links
    secrets = {name: canary(name) for name in ("database", "hub", "link", "user")}
    secrets |= {"broker": broker[1], "store": s3.secret_access_key}
    bucket = s3.new_bucket()
    variables = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1",
        "TUNERY_MODEL_DIR": str(models), "TUNERY_RETRY_MAX_S": "1", "TUNERY_LOG_LEVEL": "DEBUG",
        "TUNERY_DATABASE_URL": module_postgres_url.replace("postgres@", f"postgres:{secrets['database']}@"),
        "TUNERY_BROKER_URL": broker[0], "TUNERY_BROKER_PREFIX": uuid.uuid4().hex, "TUNERY_HF_TOKEN": secrets["hub"],
        "TUNERY_S3_ENDPOINT_URL": s3.endpoint_url, "TUNERY_S3_ACCESS_KEY_ID": s3.access_key_id,
        "TUNERY_S3_SECRET_ACCESS_KEY": s3.secret_access_key, "TUNERY_S3_BUCKET": bucket,
        "TUNERY_FETCH_NETWORKS": "127.0.0.0/8", "TUNERY_CA_BUNDLE": str(authority),
    }  # fmt: skip
    arguments = ["common.cli", "--data-dir", str(folder / "data"), "up", "--port", "0", "--workers", "1"]
    process = Process("up", arguments, variables, folder / "up.log")
    try:
        process.wait_for("Tunery listens on", 120)
        secrets["key"] = (folder / "data" / "api-key").read_text().strip()
        url = json.loads((folder / "data" / "up.json").read_text())["url"]
        with Tunery(url=url, api_key=secrets["key"]) as client:
            yield Installation(client, process, folder, secrets, host, s3, bucket)
    finally:
        process.end()


def uploaded(installation: Installation) -> str:
    """Send a file straight to the store by a signed link; return the signature."""
    content = rows().encode()
    body = {"name": "a.jsonl", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    headers = {"authorization": f"Bearer {installation.secrets['key']}"}
    with httpx2.Client(base_url=installation.client.address.url, headers=headers, trust_env=False) as http:
        upload = http.post("/uploads", json=body).json()["id"]
        [link] = http.get(f"/uploads/{upload}/parts").json()["data"]
        assert httpx2.put(link["url"], content=b"x", trust_env=False).status_code == 403
        assert httpx2.put(link["url"], content=content, trust_env=False).status_code == 200
        assert http.post(f"/uploads/{upload}/complete").json()["status"] == "completed"
    return parse_qs(urlsplit(link["url"]).query)["X-Amz-Signature"][0]


def test_no_secret_is_spread(installation: Installation):
    secrets, host, client = installation.secrets, installation.host, installation.client
    secrets["part"] = uploaded(installation)
    signed = f"?X-Amz-Signature={secrets['link']}"
    uris = {
        "succeeded": f"https://{host}/good.jsonl{signed}",
        "refused by its host": f"https://{host}/gone.jsonl{signed}",
        "bad rows": f"https://{host}/bad.jsonl{signed}",
        "sent elsewhere": f"https://{host}/hop.jsonl{signed}",
    }
    jobs = [client.jobs.create(model="tiny", dataset=uri, hyperparameters=HYPERPARAMETERS) for uri in uris.values()]
    with pytest.raises(TuneryError) as named:
        client.jobs.create(model="tiny", dataset=f"https://me:{secrets['user']}@{host}/good.jsonl")

    def ended() -> bool:
        installation.look()
        return all(client.jobs.get(job.id).status in ("succeeded", "failed") for job in jobs)

    wait_until(ended, 180, "every job to end")
    found = [client.jobs.get(job.id) for job in jobs]
    assert [job.status for job in found] == ["succeeded", "failed", "failed", "failed"], [j.error for j in found]
    assert any("worker.trainer" in line for line in installation.command_lines) and installation.children

    shown = [str(named.value), *(repr(job.error) + json.dumps(job.report) for job in found)]
    for job in jobs:
        shown += [repr(list(client.jobs.events(job.id))), repr(list(client.jobs.metrics(job.id)))]
    shown += [repr(client.workers.list().data), repr(client.keys.list())]
    places = {
        "answers": "\n".join(shown),
        "command lines": "\n".join(installation.command_lines),
        "environments of children": "\n".join(installation.children.values()),
        "logs": written(installation.folder / "data" / "logs") + (installation.folder / "up.log").read_text(),
        "working folders": written(installation.folder / "data" / "work"),
        "objects": stored(installation),
    }
    spread = [
        f"the secret of the {name} is in the {place}"
        for place, text in places.items()
        for name, secret in secrets.items()
        if secret in text
    ]
    assert not spread
    assert all(len(text) > 10 for place, text in places.items() if place != "working folders")


def written(folder: Path) -> str:
    """Return every file under `folder` as one text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(f"{path}\n{path.read_bytes().decode('latin-1')}" for path in files)


def stored(installation: Installation) -> str:
    """Return the keys and contents of every object in the bucket as one text."""
    client = installation.s3.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=installation.bucket)
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    bodies = [client.get_object(Bucket=installation.bucket, Key=key)["Body"].read() for key in keys]
    return "\n".join(keys) + b"\n".join(bodies).decode("latin-1")
