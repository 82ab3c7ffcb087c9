"""The migrations make exactly the tables of `common/db/rows.py`, on every database; and each step leads back."""

from __future__ import annotations

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

import migrations
from common.db.engine import Sessions, make_engine
from common.db.rows import Base


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))


def test_migrations_make_the_tables_of_the_rows(sessions: Sessions):
    assert differences(sessions.engine) == []
    assert migrations.present(sessions.engine) == migrations.newest()


def test_every_step_leads_back(empty_database_url: str):
    engine = make_engine(empty_database_url)
    migrations.upgrade(engine)
    command.downgrade(migrations.config(engine), "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrations.upgrade(engine)
    assert differences(engine) == []
    engine.dispose()


def test_jobs_of_before_are_found_by_their_labels(empty_database_url: str):
    engine = make_engine(empty_database_url)
    command.upgrade(migrations.config(engine), "0007")
    values = {
        "id": "job_1", "tenant": "a", "spec": "{}", "model": "m", "priority": 0, "status": "failed", "desired": "run",
        "metadata": '{"team": "red", "a\\"b": "c"}', "created_at": 0,
    }  # fmt: skip
    counts = ("epoch", "not_before", "attempts", "crashes", "faults", "shrink", "seq", "version", "step")
    values |= dict.fromkeys(counts, 0)
    with engine.begin() as connection:
        named, given = ", ".join(values), ", ".join(f":{name}" for name in values)
        connection.execute(text(f"INSERT INTO jobs ({named}) VALUES ({given})"), values)
    migrations.upgrade(engine)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT tenant, key, value, job_id FROM job_labels ORDER BY value")).all()
    engine.dispose()
    assert rows == [("a", 'a"b', "c", "job_1"), ("a", "team", "red", "job_1")]
