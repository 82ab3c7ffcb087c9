"""Removes rows that nobody asks for any more, the oldest first and never many at once.

After a month without a sweeper millions may be too old: a transaction that removed them all would hold up every writer.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Delete, delete, func, select
from sqlalchemy.orm import InstrumentedAttribute

from common.db.engine import before

# At once: some 0.1 s on either database.
FORGET_MOST = 10_000


def removal(moment: InstrumentedAttribute[Any], seconds: float, most: int = FORGET_MOST) -> Delete:
    """Return the statement that removes the `most` oldest of the rows whose `moment` is more than `seconds` ago."""
    old = select(moment).where(moment < before(seconds)).order_by(moment)
    last = old.offset(most - 1).limit(1).scalar_subquery()
    late = moment <= func.coalesce(last, before(seconds))
    # Nothing is loaded that would have to be told; otherwise every row's key would be fetched.
    return delete(moment.class_).where(late).execution_options(synchronize_session=False)
