"""What it means when the database refuses: it is away, or its schema is another version's."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from common.errors import InfraError

# Postgres: undefined_table, undefined_column.
_SQLSTATES = ("42P01", "42703")
_SQLITE_WORDS = ("no such table", "no such column", "has no column named")


def is_outdated(error: Exception) -> bool:
    """Return whether the database has not the tables and columns that this version asks for."""
    if not isinstance(error, DBAPIError):
        return False
    words = str(error.orig)
    return getattr(error.orig, "sqlstate", None) in _SQLSTATES or any(said in words for said in _SQLITE_WORDS)


def told(error: Exception) -> InfraError:
    """Return what to say of a refusal of the database."""
    if is_outdated(error):
        return InfraError(
            "the database has not the schema that this version wants",
            code="schema_outdated",
            hint="Run `python -m migrations` with the server's settings; GET /readyz says which step is wanted.",
        )
    return InfraError(
        "the database does not answer",
        code="database_away",
        hint="Try again soon; GET /readyz says which part is away.",
    )


def logged(error: Exception) -> str:
    """Return a refusal of the database for a log: drivers' texts may hold addresses and names."""
    if is_outdated(error):
        return "the database has not the schema that this version wants: run `python -m migrations`"
    return f"the database does not answer ({type(error).__name__})"
