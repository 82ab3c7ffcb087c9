"""The times of single operations, in a small and in a large table by turns, so that noise meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import select

from benchmarks.filling import SPEC, TENANT
from common.context import Context
from common.db.rows import JobRow
from common.jobs import lifecycle, queries, standing
from common.jobs.selection import Selection

Times = dict[str, float]


@dataclass
class Table:
    """One installation, and ids of jobs in it that are asked for."""

    parts: Context
    ended: list[str]
    deep: str
    waiting: list[str]

    @classmethod
    def of(cls, parts: Context, count: int) -> Table:
        """Look the ids up: jobs of all ages, one before which nearly all others come, and those that wait."""
        own = select(JobRow.id).where(JobRow.tenant == TENANT)
        with parts.read() as session:
            ids = list(session.scalars(own.where(JobRow.status == "succeeded").order_by(JobRow.id)))
            waiting = list(session.scalars(own.where(JobRow.status == "queued").order_by(JobRow.id)))
        return cls(parts, ids[:: max(1, len(ids) // count)], ids[len(ids) // 20], waiting)


def get(table: Table, number: int) -> None:
    """Read a job that has ended, as `GET /jobs/{id}` does."""
    with table.parts.read() as session:
        standing.told(session, queries.row(session, TENANT, table.ended[number % len(table.ended)]))


def get_waiting(table: Table, _: int) -> None:
    """Read the job of the tenant that comes last in line, with its place."""
    with table.parts.read() as session:
        assert standing.told(session, queries.row(session, TENANT, table.waiting[-1])).position


def listed(**chosen: Any) -> Callable[[Table, int], None]:
    """Return the operation that lists a page of the tenant's jobs."""

    def page(table: Table, _: int) -> None:
        with table.parts.read() as session:
            queries.page(session, TENANT, Selection(**chosen))

    return page


def deep(table: Table, _: int) -> None:
    """List a page near the end."""
    with table.parts.read() as session:
        queries.page(session, TENANT, after=table.deep)


def submit(table: Table, _: int) -> None:
    """Submit a job."""
    spec = SPEC.model_copy(update={"metadata": {"team": "team-new", "run": "run-new"}})
    with table.parts.sessions.write() as session:
        lifecycle.submit(session, TENANT, spec)


def claim_none(table: Table, _: int) -> None:
    """Ask for a job where none waits."""
    with table.parts.sessions.write() as session:
        assert lifecycle.claim(session, "w", 60.0) is None


class Claim:
    """Take the first job in line; giving it back is not timed."""

    def __init__(self) -> None:
        self.held: lifecycle.Claim | None = None

    def __call__(self, table: Table, _: int) -> None:
        """Claim."""
        with table.parts.sessions.write() as session:
            self.held = lifecycle.claim(session, "w", 60.0)
        assert self.held is not None

    def give_back(self, table: Table) -> None:
        """Put it back into line."""
        assert self.held is not None
        with table.parts.sessions.write() as session:
            lifecycle.release(session, self.held, lifecycle.Event("job.released", "Given back."))


def operations() -> dict[str, Callable[[Table, int], None]]:
    """Return what is timed while some jobs wait, by name."""
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    return {
        "get, ended": get, "get, last of those that wait": get_waiting, "list": listed(), "list, deep": deep,
        "list, one status": listed(status=["failed"]), "list, live statuses": listed(status=["running", "validating"]),
        "list, common label": listed(metadata={"team": "team-3"}),
        "list, rare label": listed(metadata={"run": "run-3"}),
        "list, two labels": listed(metadata={"team": "team-3", "run": "run-3"}),
        "list, rare model": listed(model="rare"), "list, of the last hour": listed(created_after=hour_ago),
        "claim": Claim(), "submit": submit,
    }  # fmt: skip


def by_turns(work: Callable[[Table, int], None], tables: list[Table], count: int) -> list[Times]:
    """Return p50 and p99 in milliseconds of `count` calls for each table, which are asked by turns."""
    taken: list[list[float]] = [[] for _ in tables]
    for number in range(-3, count):
        # Whoever comes first finds the processor's caches as another operation has left them.
        for place in range(len(tables)) if number % 2 else reversed(range(len(tables))):
            begun = time.perf_counter()
            work(tables[place], number)
            if number >= 0:
                taken[place].append(1000 * (time.perf_counter() - begun))
            if isinstance(work, Claim):
                work.give_back(tables[place])
    return [{"p50": round(statistics.median(each), 2), "p99": round(_p99(each), 2)} for each in taken]


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]
