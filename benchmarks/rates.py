"""Requests a second: the API beside a bare FastAPI route that does the same SELECT; and how soon it answers."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI
from sqlalchemy import select

from api.app import create_app
from benchmarks.filling import TENANT
from common.context import Context
from common.db.rows import JobRow
from common.embedded.ports import free_ports
from common.settings import Settings

_CLIENTS = 8
_STARTS = 5


def bare(parts: Context) -> FastAPI:
    """Return an application with one route that does the SELECT of `GET /jobs/{id}` and nothing else."""
    app = FastAPI()

    @app.get("/jobs/{job_id}")
    def read(job_id: str) -> dict[str, Any]:
        with parts.read() as session:
            row = session.scalar(select(JobRow).where(JobRow.tenant == TENANT, JobRow.id == job_id))
            assert row is not None
            return {column.key: getattr(row, column.key) for column in JobRow.__mapper__.column_attrs}

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve `app` from a process of its own and yield its address."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    listening = config.bind_socket()
    pid = os.fork()
    if pid == 0:
        uvicorn.Server(config).run(sockets=[listening])
        os._exit(0)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        listening.close()


def rate(url: str, headers: dict[str, str], seconds: float, expected: int) -> float:
    """Return the requests that `_CLIENTS` clients got answered each second."""
    counts, until = [], time.monotonic() + seconds

    def ask() -> None:
        count = 0
        with httpx2.Client(headers=headers, trust_env=False, timeout=30) as client:
            while time.monotonic() < until:
                assert client.get(url).status_code == expected
                count += 1
        counts.append(count)

    threads = [threading.Thread(target=ask) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def throughput(parts: Context, job_id: str, key: str, seconds: float) -> dict[str, float]:
    """Ask the bare route, the real one, and the real one for what has not changed, by turns; return medians."""
    job, auth = f"/jobs/{job_id}", {"authorization": f"Bearer {key}"}
    found: dict[str, list[float]] = {"bare": [], "get": [], "not_modified": []}
    parts.sessions.engine.dispose()
    with served(bare(parts)) as plain, served(create_app(parts)) as real:
        for url, headers in ((plain, {}), (real, auth)):
            _await(url + job, headers)
        tag = httpx2.get(real + job, headers=auth, trust_env=False).headers["etag"]
        for _ in range(3):
            found["bare"].append(rate(plain + job, {}, seconds, 200))
            found["get"].append(rate(real + job, auth, seconds, 200))
            found["not_modified"].append(rate(real + job, auth | {"if-none-match": tag}, seconds, 304))
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def _await(url: str, headers: dict[str, str]) -> None:
    for _ in range(3000):
        try:
            httpx2.get(url, headers=headers, trust_env=False).raise_for_status()
            return
        except httpx2.TransportError:
            time.sleep(0.01)
    raise RuntimeError(f"{url} does not answer")


def start_s(settings: Settings) -> float:
    """Return the seconds from the start of the API's process to its first answer, the median of some starts."""
    port = free_ports(1)[0]
    environment = os.environ | {
        "TUNERY_DATABASE_URL": settings.database_url, "TUNERY_BROKER_URL": settings.broker_url.get_secret_value(),
        "TUNERY_PORT": str(port), "TUNERY_S3_ENDPOINT_URL": str(settings.s3_endpoint_url),
        "TUNERY_S3_ACCESS_KEY_ID": "x", "TUNERY_S3_SECRET_ACCESS_KEY": "x",
    }  # fmt: skip
    found = []
    for _ in range(_STARTS):
        begun = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "api"], env=environment, stderr=subprocess.DEVNULL)
        try:
            _await(f"http://127.0.0.1:{port}/livez", {})
            found.append(time.monotonic() - begun)
        finally:
            process.kill()
            process.wait()
    return round(statistics.median(found), 2)
