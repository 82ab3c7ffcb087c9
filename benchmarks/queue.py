"""`python -m benchmarks.queue`: the speed of API, database and sweeper, over SQLite and Postgres.

For each database: one API on loopback beside a bare FastAPI route with the same single SELECT; the times of get, list,
submit and claim with a thousand and with a million jobs, by turns; the same with 10,000 jobs that wait; and one sweeper
beside 200 simulated workers. Prints its tables and writes JSON. Postgres is the one of the tests, without fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import create_engine, text

import migrations
from benchmarks import filling, rates, sweeping, waits
from common import context as contexts
from common import keys
from common.context import Context
from common.embedded.children import Child, Children
from common.embedded.valkey import Valkey
from common.settings import Settings
from tests.servers import prepare_postgres

_LIBRARIES = ("fastapi", "sqlalchemy", "pydantic", "uvicorn", "psycopg")
_ENVIRONMENT = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
# Waiting in either table when they are compared; and how many more come for the long queue.
_FEW = 200


@contextmanager
def servers(databases: list[str]) -> Iterator[tuple[str, Callable[[str, str], str]]]:
    """Start a broker, and Postgres where it is wanted; yield the broker's URL and what makes databases by name."""
    # A short path that an unprivileged user may enter.
    with tempfile.TemporaryDirectory(prefix="tunery-queue-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)
        children = Children(say=print)
        stack.callback(children.stop)
        valkey = Valkey(folder / "valkey", folder / "v.sock")
        children.start(Child("valkey", valkey.argv(), _ENVIRONMENT, folder / "valkey.log"), valkey.is_ready)
        url = f"postgresql+psycopg://postgres@/{{}}?host={folder / 'pg'}"
        if "postgresql" in databases:
            argv = prepare_postgres(folder, folder / "pg")
            ready = (folder / "pg" / ".s.PGSQL.5432").exists
            children.start(Child("postgres", argv, _ENVIRONMENT, folder / "pg.log", grace_s=2.0), ready)

        def made(kind: str, database: str) -> str:
            if kind == "sqlite":
                return f"sqlite:///{folder / database}.db"
            engine = create_engine(url.format("postgres"), isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {database}"))
            engine.dispose()
            return url.format(database)

        yield valkey.broker_url, made


def filled(database_url: str, broker_url: str, num_jobs: int) -> Context:
    """Return a migrated installation with so many jobs that have ended."""
    settings = Settings(
        database_url=database_url, broker_url=SecretStr(broker_url), s3_endpoint_url="http://127.0.0.1:1",
        s3_access_key_id="x", s3_secret_access_key=SecretStr("x"),
    )  # fmt: skip
    parts = contexts.build(settings)
    migrations.upgrade(parts.sessions.engine)
    filling.fill(parts.sessions.engine, num_jobs)
    return parts


def measure(sizes: list[int], contexts_: list[Context], chosen: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is measured over one kind of database."""
    begun = time.monotonic()
    large, engines = contexts_[-1], [parts.sessions.engine for parts in contexts_]
    tables = [waits.Table.of(parts, chosen.count) for parts in contexts_]
    with large.sessions.write() as session:
        key = keys.create(session, name="benchmark", tenant=filling.TENANT, admin=True)[1]
    answer: dict[str, Any] = {"start_s": rates.start_s(large.settings)}
    answer["requests_per_s"] = rates.throughput(large, tables[-1].ended[0], key, chosen.seconds)
    answer["ms"] = {"claim, none waits": waits.by_turns(waits.claim_none, tables, chosen.count)}
    for first, num_jobs, suffix in (
        (max(sizes), _FEW, f", {_FEW} wait"),
        (max(sizes) + _FEW, chosen.queued - _FEW, f", {chosen.queued:,} wait"),
    ):
        for engine in engines:
            filling.queue(engine, num_jobs, first)
        tables = [waits.Table.of(parts, chosen.count) for parts in contexts_]
        wanted = waits.operations()
        # A long queue makes no difference to the others.
        names = [name for name in wanted if suffix.startswith(f", {_FEW} ") or "list, " not in name]
        for name in names:
            answer["ms"][name + suffix] = waits.by_turns(wanted[name], tables, chosen.count)
    answer["sweeper"] = sweeping.sweep(large, chosen.sweep_s)
    answer["measuring_s"] = round(time.monotonic() - begun, 1)
    return answer


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", nargs="+", choices=("sqlite", "postgresql"), default=["sqlite", "postgresql"])
    parser.add_argument("--jobs", type=int, default=1_000_000, help="in the large table; the small one has 1,000")
    parser.add_argument("--queued", type=int, default=10_000, help="jobs in the long queue")
    parser.add_argument("--count", type=int, default=200, help="calls of each operation and table")
    parser.add_argument("--seconds", type=float, default=3.0, help="of asking each route, three times")
    parser.add_argument("--sweep-s", type=float, default=75.0, help="for which the simulated workers work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/queue.json"))
    chosen = parser.parse_args()
    sizes = [1000, chosen.jobs]
    answer: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "cores": os.cpu_count(), "load": os.getloadavg(),
        "command": shlex.join(["python", "-m", "benchmarks.queue", *sys.argv[1:]]), "jobs": sizes,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in _LIBRARIES}},
    }  # fmt: skip
    begun = time.monotonic()
    with servers(chosen.databases) as (broker_url, made):
        for kind in chosen.databases:
            parts = [filled(made(kind, f"jobs_{size}"), broker_url, size) for size in sizes]
            answer[kind] = measure(sizes, parts, chosen) | {"load_after": os.getloadavg()}
            for each in parts:
                each.close()
            show(kind, answer[kind], sizes)
            answer["total_s"] = round(time.monotonic() - begun, 1)
            chosen.out.write_text(json.dumps(answer, indent=1) + "\n")
    print(f"\n{answer['total_s']} s in all")
    return 0


def show(kind: str, found: dict[str, Any], sizes: list[int]) -> None:
    """Print the tables of one database."""
    print(f"\n## {kind}\n\nstart of the API: {found['start_s']} s\n")
    print("| route | requests/s | to the bare one |\n|---|---|---|")
    answered = found["requests_per_s"]
    for name, value in answered.items():
        print(f"| {name} | {value:,.0f} | {value / answered['bare']:.2f} |")
    small, large = (f"{size:,} jobs" for size in sizes)
    print(f"\n| ms, p50 / p99 | {small} | {large} | ratio of p50 | of p99 |\n|---|---|---|---|---|")
    for name, (few, many) in found["ms"].items():
        ratios = " | ".join(f"{many[each] / few[each]:.2f}" for each in ("p50", "p99"))
        print(f"| {name} | {few['p50']} / {few['p99']} | {many['p50']} / {many['p99']} | {ratios} |")
    print("\n| sweeper | |\n|---|---|")
    for name, value in found["sweeper"].items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    sys.exit(main())
