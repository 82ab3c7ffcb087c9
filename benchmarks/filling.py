"""Fills a table of jobs as years of use would have: in SQL alone, so that a million take a minute and not an hour.

One job in every so many seconds of a year: 20 tenants of unlike size, seven models and a rare one, labels that many and
labels that few jobs carry, 85 % succeeded, three events each, and for each success the time that it held a worker.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, Engine, text

from common.schemas.jobs import JobSpec

TENANT = "default"
SPEC = JobSpec.model_validate({"model": "tiny", "dataset": "https://example.com/train.jsonl"})
YEAR_S = 365 * 86_400
_QUEUE_STEP_S = 0.02
_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
# The id of job n: a ULID of the moment at which it was made, as `common/ids.py` writes them, and its number.
_TIME = " || ".join(
    f"substr('{_DIGITS}', CAST(((n.ms >> {shift}) & 31) + 1 AS integer), 1)" for shift in range(45, -1, -5)
)
_NUMBERED = """
  WITH RECURSIVE numbers(i) AS (SELECT CAST(:first AS bigint) UNION ALL SELECT i + 1 FROM numbers WHERE i + 1 < :last),
  n AS (SELECT i, CAST((:begin + i * :step) * 1000 AS bigint) AS ms FROM numbers)
"""
_JOBS = """
INSERT INTO jobs (id, tenant, spec, model, priority, metadata, status, desired, epoch, not_before, hold_until, attempts,
  crashes, faults, shrink, seq, version, step, base_id, report, preflight,
  created_at, queued_at, started_at, finished_at)
%s
SELECT 'job_' || %s || substr(CAST(10000000000000000 + n.i AS text), 2),
  CASE WHEN n.i %% 10 < 3 THEN 'default' ELSE 't' || CAST(n.i %% 19 AS text) END, CAST(:spec AS JSONTYPE),
  CASE WHEN n.i %% 20000 = 17 THEN 'rare' ELSE 'model-' || CAST(n.i %% 7 AS text) END, 0,
  CAST('{"team": "team-' || CAST(n.i %% 12 AS text) || '", "run": "run-' || CAST(n.i / 50 AS text) || '"}' AS JSONTYPE),
  CASE WHEN :status <> '' THEN :status WHEN n.i %% 20 < 17 THEN 'succeeded' WHEN n.i %% 20 < 19 THEN 'failed'
    ELSE 'cancelled' END,
  'run', 1, 0, 0, 1, 0, 0, 0, 3, 3, 100, 'model-' || CAST(n.i %% 7 AS text),
  CASE WHEN :status = '' THEN CAST(:report AS JSONTYPE) END, CAST('{"train_tokens": 100000}' AS JSONTYPE),
  n.ms / 1000.0, n.ms / 1000.0 + 10, CASE WHEN :status = '' THEN n.ms / 1000.0 + 60 END,
  CASE WHEN :status = '' THEN n.ms / 1000.0 + 660 END FROM n
"""
_LABELS = """
INSERT INTO job_labels (tenant, key, value, job_id)
SELECT jobs.tenant, label.key, label.value, jobs.id FROM jobs CROSS JOIN %s AS label
WHERE NOT EXISTS (SELECT 1 FROM job_labels AS known WHERE known.job_id = jobs.id)
"""
_EVENTS = """
INSERT INTO job_events (job_id, seq, at, name, level, message, data)
SELECT id, step.seq, created_at + step.seq, step.name, 'info', 'What happened, in a sentence of usual length.',
  CAST('{}' AS JSONTYPE)
FROM jobs CROSS JOIN (SELECT 1 AS seq, 'job.submitted' AS name UNION ALL SELECT 2, 'job.accepted'
  UNION ALL SELECT 3, 'job.succeeded') AS step
WHERE NOT EXISTS (SELECT 1 FROM job_events AS known WHERE known.job_id = jobs.id)
"""
_USAGE = """
INSERT INTO usage (job_id, epoch, tenant, started_at, ended_at)
SELECT id, 1, tenant, started_at, finished_at FROM jobs WHERE status = 'succeeded'
"""


def fill(engine: Engine, num_jobs: int) -> None:
    """Insert `num_jobs` ended jobs, spread over the last year, with their labels, events and use of workers."""
    with engine.begin() as connection:
        now = _now(connection)
        _insert(connection, 0, num_jobs, now - YEAR_S, YEAR_S / num_jobs, "")
        _run(connection, _LABELS % _each(connection))
        _run(connection, _EVENTS)
        _run(connection, _USAGE)
    _settle(engine)


def queue(engine: Engine, num_jobs: int, first: int) -> None:
    """Insert `num_jobs` jobs more, numbered from `first`, which were accepted within the last minutes and wait."""
    with engine.begin() as connection:
        begin = _now(connection) - 300 - first * _QUEUE_STEP_S
        _insert(connection, first, first + num_jobs, begin, _QUEUE_STEP_S, "queued")
        _run(connection, _LABELS % _each(connection))
        _run(connection, _EVENTS)
    _settle(engine)


def _insert(connection: Connection, first: int, last: int, begin: float, step: float, status: str) -> None:
    report = json.dumps({"final_loss": 1.0, "tokens_per_s": 100.0, "train_s": 500.0})
    values = {"spec": json.dumps(SPEC.model_dump(mode="json")), "report": report, "status": status}
    statement = _JOBS % (_NUMBERED, _TIME)
    _run(connection, statement, values | {"first": first, "last": last, "begin": begin, "step": step})


def _run(connection: Connection, statement: str, values: dict[str, Any] | None = None) -> None:
    kind = {"postgresql": "jsonb", "sqlite": "text"}[connection.dialect.name]
    connection.execute(text(statement.replace("JSONTYPE", kind)), values or {})


def _each(connection: Connection) -> str:
    return {"postgresql": "jsonb_each_text(jobs.metadata)", "sqlite": "json_each(jobs.metadata)"}[
        connection.dialect.name
    ]


def _now(connection: Connection) -> float:
    seconds = {
        "postgresql": "extract(epoch from clock_timestamp())",
        "sqlite": "(julianday('now') - 2440587.5) * 86400",
    }
    return float(connection.execute(text(f"SELECT {seconds[connection.dialect.name]}")).scalar_one())


def _settle(engine: Engine) -> None:
    """Do what a year would have done: Postgres gathers statistics, SQLite empties its log into the database."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(
            text({"postgresql": "VACUUM ANALYZE", "sqlite": "PRAGMA wal_checkpoint(TRUNCATE)"}[engine.dialect.name])
        )
