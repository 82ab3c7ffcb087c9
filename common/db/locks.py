"""Locks by name, for what has no row yet that could be locked."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session


def lock(session: Session, name: str) -> None:
    """Keep everybody else who locks `name` waiting until the transaction ends. Of a writing session only."""
    # SQLite's write transaction already excludes every other one.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
