"""A million ended jobs cost nothing: what is asked again and again reads indexes of the live ones."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import Engine, event, insert

import migrations
from common.db.engine import Sessions, make_engine
from common.db.rows import JobRow
from common.jobs import forecast, lifecycle, line, queries, standing
from common.schemas.jobs import JobSpec

SPEC = JobSpec.model_validate({"model": "tiny", "dataset": "https://example.com/train.jsonl"})


@pytest.fixture
def engine(sqlite_url: str) -> Engine:
    """A SQLite in which most jobs have ended."""
    made = make_engine(sqlite_url)
    migrations.upgrade(made)
    now, spec = time.time(), SPEC.model_dump(mode="json")
    rows = [
        {"id": f"job_{number:05d}", "tenant": f"t{number % 3}", "spec": spec, "model": "tiny", "metadata": {},
         "status": {0: "queued", 1: "validating"}.get(number, "succeeded"), "base_id": "b", "created_at": now,
         "queued_at": now, "finished_at": now}
        for number in range(3000)
    ]  # fmt: skip
    with made.begin() as connection:
        connection.execute(insert(JobRow.__table__), rows)
    return made


def plans(engine: Engine, work: object) -> list[str]:
    """Return each step of the plans of the queries that `work` makes."""
    asked: list[tuple[str, object]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    with Sessions(engine).read() as session:
        work(session)  # type: ignore[operator]
        session.rollback()
    event.remove(engine, "before_cursor_execute", note)
    found: list[str] = []
    with engine.connect() as connection:
        for statement, parameters in asked:
            if statement.startswith(("SELECT", "WITH")):
                explained = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
                found += [row[3] for row in explained]
    assert found
    return found


WORK = {
    "claim": lambda session: lifecycle.claim(session, "w", 60.0),
    "check": lambda session: lifecycle.claim_preflight(session, "w", 60.0),
    "position": lambda session: session.execute(line.positions().select()).all(),
    "read": lambda session: standing.told(session, queries.row(session, "t0", "job_00000")),
    "list": lambda session: queries.page(session, "t0"),
    "forecast": lambda session: forecast.speeds(session, ["b"]),
}


@pytest.mark.parametrize("name", WORK)
def test_no_query_scans_the_jobs(engine: Engine, name: str):
    scans = [step for step in plans(engine, WORK[name]) if step.startswith("SCAN jobs")]
    assert not [step for step in scans if "jobs_to_claim" not in step], scans
