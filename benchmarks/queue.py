"""`python -m benchmarks.queue`: the speed of API and database.

One API on loopback over SQLite, beside a bare FastAPI route with the same single SELECT, both asked by turns in the
same run; then the times of get, list, submit and claim with a thousand and with many jobs in the table. Prints its
tables and writes JSON. `--database URL` measures an empty database of another kind.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import insert, select

import migrations
from api.app import create_app
from common import context as contexts
from common import keys
from common.context import Context
from common.db.rows import JobRow
from common.jobs import lifecycle, queries, standing
from common.schemas.jobs import JobSpec
from common.settings import Settings

TENANT = "default"
_SPEC = JobSpec.model_validate({"model": "tiny", "dataset": "https://example.com/train.jsonl"})
_CLIENTS = 8
_BATCH = 5000


def fill(parts: Context, first: int, last: int, queued: int) -> None:
    """Insert jobs `first` to `last`: of every table `queued` wait, the others have ended."""
    spec, now = _SPEC.model_dump(mode="json"), time.time()
    for start in range(first, last, _BATCH):
        rows = []
        for number in range(start, min(start + _BATCH, last)):
            waits = number < queued
            rows.append({
                "id": f"job_{number:026d}", "tenant": TENANT, "spec": spec, "model": "tiny", "metadata_": {},
                "status": "queued" if waits else "succeeded", "base_id": "tiny", "created_at": now - number,
                "queued_at": now, "finished_at": None if waits else now, "version": 1, "seq": 1,
                "report": None if waits else {"final_loss": 1.0, "tokens_per_s": 100.0, "train_s": 10.0},
            })  # fmt: skip
        with parts.write() as session:
            session.execute(insert(JobRow), rows)


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


def throughput(parts: Context, key: str, seconds: float) -> dict[str, float]:
    """Ask the bare route, the real one, and the real one for what has not changed, by turns; return medians."""
    job, auth = f"/jobs/job_{500:026d}", {"authorization": f"Bearer {key}"}
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
    for _ in range(300):
        try:
            httpx2.get(url, headers=headers, trust_env=False).raise_for_status()
            return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer")


def p99_ms(work: Callable[[int], object], count: int) -> float:
    """Return the time that 99 % of `count` calls stay below."""
    times = []
    for number in range(count):
        begun = time.perf_counter()
        work(number)
        times.append(time.perf_counter() - begun)
    return round(1000 * statistics.quantiles(times, n=100)[98], 2)


def latencies(parts: Context, size: int, count: int) -> dict[str, float]:
    """Return the p99 of each operation with `size` jobs in the table, in milliseconds."""

    def get(number: int) -> None:
        with parts.read() as session:
            standing.told(session, queries.row(session, TENANT, f"job_{100 + number * (size - 200) // count:026d}"))

    def page(_: int) -> None:
        with parts.read() as session:
            queries.page(session, TENANT)

    def submit(_: int) -> None:
        with parts.sessions.write() as session:
            lifecycle.submit(session, TENANT, _SPEC)

    def claim(number: int) -> None:
        with parts.sessions.write() as session:
            assert lifecycle.claim(session, "w", 60.0) is not None
            session.rollback()

    operations = {"get": get, "list": page, "claim": claim, "submit": submit}
    for work in operations.values():
        work(0)
    return {name: p99_ms(work, count) for name, work in operations.items()}


def start_s(settings: Settings) -> float:
    """Return the seconds from the start of the API's process to its first answer, the least of three."""
    environment = os.environ | {
        "TUNERY_DATABASE_URL": settings.database_url, "TUNERY_BROKER_URL": settings.broker_url.get_secret_value(),
        "TUNERY_PORT": "18999", "TUNERY_S3_ENDPOINT_URL": str(settings.s3_endpoint_url),
        "TUNERY_S3_ACCESS_KEY_ID": "x", "TUNERY_S3_SECRET_ACCESS_KEY": "x",
    }  # fmt: skip
    found = []
    for _ in range(3):
        begun = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "api"], env=environment, stderr=subprocess.DEVNULL)
        try:
            _await("http://127.0.0.1:18999/livez", {})
            found.append(time.monotonic() - begun)
        finally:
            process.kill()
            process.wait()
    return round(min(found), 2)


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.queue", *sys.argv[1:]])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", help="an empty database; left out: SQLite in a temporary folder")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--queued", type=int, default=100)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/queue.json"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1):
        settings = Settings(
            database_url=chosen.database or f"sqlite:///{folder}/queue.db", broker_url=SecretStr("memory://"),
            s3_endpoint_url="http://127.0.0.1:1", s3_access_key_id="x", s3_secret_access_key=SecretStr("x"),
        )  # fmt: skip
        parts = contexts.build(settings)
        migrations.upgrade(parts.sessions.engine)
        with parts.sessions.write() as session:
            key = keys.create(session, name="benchmark", tenant=TENANT, admin=True)[1]
        fill(parts, 0, 1000, chosen.queued)
        answer: dict[str, Any] = {
            "when": time.strftime("%Y-%m-%d"), "command": _command(), "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0], "database": parts.sessions.engine.dialect.name,
            "versions": {name: version(name) for name in ("fastapi", "sqlalchemy", "pydantic", "uvicorn")},
            "start_s": start_s(settings), "requests_per_s": throughput(parts, key, chosen.seconds),
            "p99_ms": {1000: latencies(parts, 1000, chosen.count)},
        }  # fmt: skip
        fill(parts, 1000, chosen.jobs, chosen.queued)
        answer["p99_ms"][chosen.jobs] = latencies(parts, chosen.jobs, chosen.count)
        parts.close()
    show(answer)
    chosen.out.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


def show(answer: dict[str, Any]) -> None:
    """Print the tables."""
    rates = answer["requests_per_s"]
    print(f"start of the API: {answer['start_s']} s\n\n| route | requests/s | to the bare one |\n|---|---|---|")
    for name, value in rates.items():
        print(f"| {name} | {value:,.0f} | {value / rates['bare']:.2f} |")
    (small, few), (large, many) = answer["p99_ms"].items()
    print(f"\n| p99 ms | {small:,} jobs | {large:,} jobs | ratio |\n|---|---|---|---|")
    for name, value in few.items():
        print(f"| {name} | {value} | {many[name]} | {many[name] / value:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
