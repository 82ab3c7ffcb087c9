"""The migrations make exactly the tables of `common/db/rows.py`, on every database; and each step leads back."""

from __future__ import annotations

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect

import migrations
from common.db.engine import Sessions, make_engine
from common.db.rows import Base


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))


def test_migrations_make_the_tables_of_the_rows(sessions: Sessions):
    assert differences(sessions.engine) == []
    assert migrations.present(sessions.engine) == migrations.newest()


def test_every_step_leads_back(database_url: str):
    engine = make_engine(database_url)
    migrations.upgrade(engine)
    command.downgrade(migrations.config(engine), "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrations.upgrade(engine)
    assert differences(engine) == []
    engine.dispose()
