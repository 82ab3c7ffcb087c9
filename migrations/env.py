"""Alembic runs this for every command: connect with Tunery's engine and run the steps in one transaction."""

from alembic import context
from sqlalchemy import text

from common.db.engine import IMMEDIATE
from common.db.rows import Base

# Any number that nothing else locks: two starting processes must not migrate at once.
_LOCK = 7_305_801_446

engine = context.config.attributes["engine"].execution_options(**{IMMEDIATE: True})
with engine.connect() as connection, connection.begin():
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"select pg_advisory_xact_lock({_LOCK})"))
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    context.run_migrations()
