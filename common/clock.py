"""Times of the database, which are seconds since the epoch, as people and programs read them."""

from __future__ import annotations

from datetime import UTC, datetime


def moment(seconds: float) -> datetime:
    """Return a time of the database as a UTC datetime."""
    return datetime.fromtimestamp(seconds, UTC)
