"""Writes that must not be lost to a database that is away for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from common.context import Context
from common.errors import LeaseLost
from worker.heart import Heart

_PAUSE_S = 0.2
# The database is there and says no: asking again would ask for ever, with the lease alive.
_REFUSALS = (DataError, IntegrityError, ProgrammingError)
_log = logging.getLogger(__name__)
T = TypeVar("T")


def persist(context: Context, heart: Heart, change: Callable[[Session], T]) -> T:
    """Run `change` in a transaction; while the database is away try again, until the fence ends the attempt.

    `change` may be run again after a commit whose answer was lost with its connection.

    Raises:
        LeaseLost: the attempt no longer owns its job.
    """
    while True:
        try:
            with context.write() as session:
                return change(session)
        except _REFUSALS:
            raise
        except (DBAPIError, PoolTimeout) as error:
            if heart.lost:
                raise LeaseLost("the lease ended while the database was away") from error
            _log.warning("the database is away (%s)", type(error).__name__)
            time.sleep(_PAUSE_S)
