"""A million ended jobs cost nothing: what is asked again and again reads indexes, and as many rows as it shows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from common.clock import moment
from common.db.engine import Sessions, make_engine
from common.db.forgetting import removal
from common.db.rows import DeliveryRow, IdempotencyRow, JobRow, LabelRow, UsageRow
from common.ids import before_all
from common.jobs import forecast, lifecycle, line, queries, standing
from common.jobs.selection import Selection
from common.schemas.jobs import JobSpec

SPEC = JobSpec.model_validate({"model": "tiny", "dataset": "https://example.com/train.jsonl"})
JOBS = 3000
DAY_S = 86_400.0
Work = Callable[[Session], object]


@dataclass(frozen=True)
class Full:
    """A database in which most jobs have ended, one an hour."""

    engine: Engine
    ids: list[str] = field(default_factory=list)


@pytest.fixture
def full(database_url: str) -> Iterator[Full]:
    """JOBS jobs of three tenants; every one has the label `all: x`, one of a hundred `rare: x`."""
    made = make_engine(database_url)
    now, spec = time.time(), SPEC.model_dump(mode="json")
    ids = [f"{before_all('job', now - 3600 * number)}{number:016d}" for number in range(JOBS)]
    rows = [
        {"id": ids[number], "tenant": f"t{number % 3}", "spec": spec, "model": "odd" if number % 100 == 2 else "tiny",
         "metadata": {}, "status": {0: "queued", 1: "validating"}.get(number, "succeeded"), "base_id": "b",
         "created_at": now - 3600 * number, "queued_at": now, "finished_at": now}
        for number in range(JOBS)
    ]  # fmt: skip
    labels = [
        {"tenant": f"t{number % 3}", "key": key, "value": "x", "job_id": ids[number]}
        for number in range(JOBS)
        for key in ("all", "rare")
        if key == "all" or number % 100 == 2
    ]
    usage = [
        {"job_id": ids[number], "epoch": 1, "tenant": f"t{number % 3}", "started_at": now - 3600 * number - 60,
         "ended_at": now - 3600 * number}
        for number in range(2, JOBS)
    ]  # fmt: skip
    with made.begin() as connection:
        connection.execute(insert(JobRow.__table__), rows)
        connection.execute(insert(UsageRow.__table__), usage)
        connection.execute(insert(LabelRow.__table__), labels)
    if made.dialect.name == "postgresql":
        with made.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
    yield Full(made, ids)
    made.dispose()


def asked(engine: Engine, work: Work) -> list[tuple[str, Any]]:
    """Return the queries that `work` makes, and their parameters."""
    found: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        found.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    with Sessions(engine).read() as session:
        work(session)
        session.rollback()
    event.remove(engine, "before_cursor_execute", note)
    return [query for query in found if query[0].startswith(("SELECT", "WITH"))]


def plans(engine: Engine, work: Work) -> list[str]:
    """Return each step of the plans that SQLite makes for the queries of `work`."""
    found: list[str] = []
    with engine.connect() as connection:
        for statement, parameters in asked(engine, work):
            explained = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            found += [row[3] for row in explained]
    assert found
    return found


def rows_read(engine: Engine, work: Work) -> int:
    """Return the rows that Postgres reads for the queries of `work`, those included that it throws away."""
    read = 0.0
    with engine.connect() as connection:
        for statement, parameters in asked(engine, work):
            explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            read += _read(explained.scalar()[0]["Plan"])
    return round(read)


def _read(node: dict[str, Any]) -> float:
    own = 0.0
    if "Scan" in node["Node Type"] and "Relation Name" in node:
        removed = sum(value for name, value in node.items() if name.startswith("Rows Removed by"))
        own = (node["Actual Rows"] + removed) * node["Actual Loops"]
    return own + sum(_read(child) for child in node.get("Plans", ()))


def at(days_ago: float) -> datetime:
    """Return the moment so many days ago."""
    return moment(time.time() - days_ago * DAY_S)


def listed(**chosen: Any) -> Callable[[Full], Work]:
    """Return the work of listing the jobs of `t2` by a filter."""
    return lambda _: lambda session: queries.page(session, "t2", Selection(**chosen))


WORK: dict[str, Callable[[Full], Work]] = {
    "claim": lambda _: lambda session: lifecycle.claim(session, "w", 60.0),
    "check": lambda _: lambda session: lifecycle.claim_preflight(session, "w", 60.0),
    "position": lambda _: lambda session: session.execute(line.positions().select()).all(),
    "read": lambda full: lambda session: standing.told(session, queries.row(session, "t0", full.ids[0])),
    "forecast": lambda _: lambda session: forecast.speeds(session, ["b"]),
    "list": listed(),
    "deep": lambda full: lambda session: queries.page(session, "t2", after=full.ids[JOBS - 60]),
    "one status": listed(status=["running"]),
    "several statuses": listed(status=["running", "queued", "failed"]),
    "common label": listed(metadata={"all": "x"}),
    "rare label": listed(metadata={"rare": "x"}),
    "no such label": listed(metadata={"all": "none"}),
    "labels": listed(metadata={"rare": "x", "team": "red"}),
    "label and live status": listed(metadata={"all": "x"}, status=["running"]),
    "rare model": listed(model="odd"),
    "no such model": listed(model="none"),
    "lately": listed(created_after=at(0.2)),
    "long ago": listed(created_before=at(120)),
}
# What a query may read beside the rows that it shows: of each page 21, and of an age a day of other clocks.
MOST = 150


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_sqlite_scans_no_table(full: Full, name: str):
    steps = plans(full.engine, WORK[name](full))
    scans = [step for step in steps if re.match(r"SCAN (jobs|job_labels)", step) and "jobs_to_" not in step]
    assert not scans, steps


@pytest.mark.parametrize("name", ["common label", "rare label", "no such label", "labels"])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_sqlite_finds_labels_by_their_index(full: Full, name: str):
    steps = plans(full.engine, WORK[name](full))
    inner = steps[next(place for place, step in enumerate(steps) if step.startswith("LIST SUBQUERY")) + 1 :]
    assert re.match(r"SEARCH job_labels_1 .*\(tenant=\? AND key=\? AND value=\?\)", inner[0]), steps
    assert not any("TEMP B-TREE" in step for step in steps), steps


@pytest.mark.parametrize(("name", "index"), [("rare model", "jobs_by_tenant_model"), ("one status", "tenant_status")])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_sqlite_has_an_index_for_it(full: Full, name: str, index: str):
    steps = plans(full.engine, WORK[name](full))
    assert any(index in step for step in steps) and not any("TEMP B-TREE FOR ORDER BY" in step for step in steps[:2])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_rarest_label_leads(full: Full):
    both = [listed(metadata=dict.fromkeys(keys, "x"))(full) for keys in (("rare", "all"), ("all", "rare"))]
    first, second = (steps_taken(full.engine, work) for work in both)
    # The jobs of a label are counted in some thousand steps; to try them takes ten times as many.
    assert max(first, second) <= 12 and abs(first - second) <= 1, (first, second)


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_postgres_reads_no_more_rows_than_it_shows(full: Full, name: str):
    assert rows_read(full.engine, WORK[name](full)) <= MOST


@pytest.mark.parametrize("row", [UsageRow.ended_at, IdempotencyRow.created_at, DeliveryRow.ended_at], ids=str)
@pytest.mark.parametrize("database_url", ["sqlite", "postgres"], indirect=True)
def test_what_is_old_is_looked_up_by_its_age(full: Full, row: InstrumentedAttribute[float]):
    query = removal(row, DAY_S).compile(full.engine, compile_kwargs={"literal_binds": True})  # type: ignore[assignment]
    with full.engine.connect() as connection:
        if full.engine.dialect.name == "postgresql":
            # Tables that are all but empty are scanned whatever index they have.
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        explain = "EXPLAIN QUERY PLAN" if full.engine.dialect.name == "sqlite" else "EXPLAIN"
        plan = str(connection.exec_driver_sql(f"{explain} {query}").all())
    assert "Index Cond: " in plan or f"({row.key}<?)" in plan, plan


def steps_taken(engine: Engine, work: Work) -> int:
    """Return the thousands of steps that SQLite's machine takes for `work`, which no other program slows down."""
    taken = 0

    def count() -> None:
        nonlocal taken
        taken += 1

    with Sessions(engine).read() as session:
        raw = session.connection().connection.dbapi_connection
        raw.set_progress_handler(count, 1000)
        work(session)
        raw.set_progress_handler(None, 0)
        session.rollback()
    return taken


def let_wait(full: Full, count: int) -> None:
    """Let so many of the jobs have been queued a while ago."""
    waits = {"status": "queued", "hold_until": 0, "queued_at": time.time() - 2 * line.PREFER_HELD_BASE_S}
    with full.engine.begin() as connection:
        connection.execute(update(JobRow.__table__).where(JobRow.id > full.ids[count]).values(waits))


@pytest.mark.parametrize(("name", "most"), [("claim", 1.5), ("position", 10), ("read", 10)])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_long_queue_costs_in_proportion_and_a_claim_nothing(full: Full, name: str, most: float) -> None:
    taken = []
    for waiting in (300, 1500):
        let_wait(full, waiting)
        taken.append(steps_taken(full.engine, WORK[name](full)))
    assert taken[1] <= most * taken[0], taken


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_postgres_reads_no_more_rows_for_a_claim_behind_many(full: Full) -> None:
    let_wait(full, 1500)
    with full.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE jobs")
    assert rows_read(full.engine, WORK["claim"](full)) <= MOST
