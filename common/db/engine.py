"""Connections: one code for Postgres and SQLite, and the database's own clock.

Leases are judged by the database's clock only, so that no worker's wrong clock can keep or steal a job. Times are
stored as seconds since the epoch (double precision), which both databases compare and add the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, Double, Engine, ScalarSelect, create_engine, event, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.functions import FunctionElement

_BUSY_TIMEOUT_MS = 30_000
_IDLE_IN_TRANSACTION = "10s"
IMMEDIATE = "tunery_begin_immediate"


class db_now(FunctionElement[float]):
    """The database's present time in seconds since the epoch, at the moment of the statement."""

    type = Double()
    inherit_cache = True
    name = "db_now"


@compiles(db_now, "postgresql")
def _now_postgres(_element: db_now, _compiler: Any, **_: Any) -> str:
    # Not now(): that is the start of the transaction, which may be long before a lock was granted.
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(db_now, "sqlite")
def _now_sqlite(_element: db_now, _compiler: Any, **_: Any) -> str:
    # Not unixepoch('subsec'), which needs SQLite 3.42; this one is exact to the millisecond as well.
    return "((julianday('now') - 2440587.5) * 86400.0)"


def clock(session: Session) -> float:
    """Return the database's present time in seconds since the epoch."""
    return float(session.scalar(select(db_now())) or 0.0)


def once(moment: ColumnElement[float]) -> ScalarSelect[float]:
    """Return `moment`, which contains the database's clock, as a subquery that a statement evaluates once.

    Otherwise Postgres reads the clock again for each row, and so cannot use an index for the comparison.
    """
    return select(moment.label("moment")).scalar_subquery()


def before(seconds: float) -> ScalarSelect[float]:
    """Return the moment `seconds` ago by the database's clock, evaluated once in a statement."""
    return once(db_now() - seconds)


class db_month(FunctionElement[float]):
    """The first moment of the present calendar month (UTC) in seconds since the epoch, by the database's clock."""

    type = Double()
    inherit_cache = True
    name = "db_month"


@compiles(db_month, "postgresql")
def _month_postgres(_element: db_month, _compiler: Any, **_: Any) -> str:
    return "extract(epoch from date_trunc('month', clock_timestamp(), 'UTC'))::double precision"


@compiles(db_month, "sqlite")
def _month_sqlite(_element: db_month, _compiler: Any, **_: Any) -> str:
    return "((julianday('now', 'start of month') - 2440587.5) * 86400.0)"


def make_engine(url: str, *, pool_size: int = 10) -> Engine:
    """Return an engine for `url` (`postgresql+psycopg://…` or `sqlite:///…`) with Tunery's connection settings.

    Errors never show the values of a statement: the secret of a webhook may be one of them.
    """
    if url.startswith("sqlite"):
        arguments = {"timeout": _BUSY_TIMEOUT_MS / 1000, "check_same_thread": False}
        engine = create_engine(url, connect_args=arguments, hide_parameters=True)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    # Keepalives and timeouts, so that a half-open connection ends as an error and not as a wait.
    arguments = {
        "connect_timeout": 5,
        "keepalives": 1,
        "keepalives_idle": 5,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 15_000,
    }
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        pool_timeout=10,
        connect_args=arguments,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _prepare_postgres)
    event.listen(engine, "after_cursor_execute", _set_timer_again)
    return engine


def _prepare_postgres(connection: Any, _record: Any) -> None:
    # A process that is frozen or cut off between two statements would hold its row for hours. Set here and not in the
    # connection's options, which poolers refuse.
    connection.autocommit = True
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_IN_TRANSACTION}'")
    connection.autocommit = False


def _set_timer_again(connection: Connection, _c: Any, _s: Any, _p: Any, _x: Any, executemany: bool) -> None:
    # psycopg 3.3 sends many rows as a pipeline, after which Postgres 18 waits for the next statement without its timer
    # (a flush message takes it back): a plain statement starts it.
    if executemany:
        connection.exec_driver_sql("SELECT 1")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver must not open transactions by itself: _begin_sqlite says which kind.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_TIMEOUT_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A write transaction takes its lock at once: upgrading a read lock later fails without waiting.
    immediate = connection.get_execution_options().get(IMMEDIATE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


class Sessions:
    """Opens sessions: `read()` for looking, `write()` for one transaction that commits when its block ends."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._readers = sessionmaker(engine, expire_on_commit=False)
        self._writers = sessionmaker(engine.execution_options(**{IMMEDIATE: True}), expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session whose changes, if any, are thrown away."""
        with self._readers() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session that is committed at the end of the block, or rolled back by an exception."""
        with self._writers() as session, session.begin():
            yield session
