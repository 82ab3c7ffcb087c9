"""The database's schema, step by step (Alembic). `python -m migrations` brings a database to the newest step."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine


def config(engine: Engine) -> Config:
    """Return Alembic's configuration for `engine`; there is no ini file, since settings have one place."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.attributes["engine"] = engine
    return made


def upgrade(engine: Engine) -> None:
    """Bring the database to the newest step; safe to call from several processes at once."""
    command.upgrade(config(engine), "head")


def present(engine: Engine) -> str | None:
    """Return the step that the database is at, or None if it is empty."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def newest() -> str:
    """Return the newest step that this version of Tunery knows."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    head = ScriptDirectory.from_config(made).get_current_head()
    if head is None:
        raise RuntimeError("no migration is installed")
    return head
