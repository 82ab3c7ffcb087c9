"""The order in which queued jobs are claimed, written once: `claim` takes the first of it, `standing` counts along it.

The jobs of one tenant and priority stand in one line, which the index `jobs_to_claim` holds in its order: a claim looks
at the head of each line only, however many jobs wait behind it.

Priority comes first, then the tenant with the fewest running jobs, then the one whose jobs held workers for the fewest
minutes of the past day (so that a single worker is shared too), then age. A tenant at one of its quotas stands outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Select,
    SQLColumnExpression,
    Table,
    and_,
    case,
    cast,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.orm import Session

from common.db.engine import db_month, db_now, once
from common.db.rows import JobRow, QuotaRow, UsageRow

# Use of workers counts towards a tenant's share for so long.
SHARE_S = 86_400.0
# A worker prefers a job whose base it holds, but never over one that has waited longer than this.
PREFER_HELD_BASE_S = 60.0
HOUR_S = 3600.0
NOTHING: Mapping[str, int] = MappingProxyType({})

jobs: Table = JobRow.__table__  # type: ignore[assignment]
usage: Table = UsageRow.__table__  # type: ignore[assignment]
quotas: Table = QuotaRow.__table__  # type: ignore[assignment]
# No tenant and no priority are as low.
_BEFORE_ALL = (("", jobs.c.tenant), (-1000, jobs.c.priority))


# Kept: to put it together takes as long as to run it.
@lru_cache(maxsize=32)
def lines(held_base: str | None) -> Select[Any]:
    """Return the lines (tenant, priority, max_running) whose turn it is for a worker that holds `held_base`, in order.

    `warmth` is that of a line's head: which of `firsts` finds it.
    """
    line = _lines()
    of = _tenants(line)
    has_place = or_(of.c.max_running.is_(None), of.c.running < of.c.max_running)
    heads = (found.correlate(line).scalar_subquery() for found in firsts(line.c.tenant, line.c.priority, held_base))
    headed = (
        select(line.c.tenant, line.c.priority, of.c.max_running, of.c.running, of.c.share)
        .add_columns(func.coalesce(*heads).label("head"))
        .join(of, of.c.tenant == line.c.tenant)
        .where(_has_hours(of), has_place)
        .cte("headed")
        .prefix_with("MATERIALIZED")
    )
    # Each looked up by its id: for a join, Postgres may read every job that ever was.
    warmth, created_at = (
        select(column).where(jobs.c.id == headed.c.head).scalar_subquery()
        for column in (_warmth(held_base), jobs.c.created_at)
    )
    return (
        select(headed.c.tenant, headed.c.priority, headed.c.max_running, warmth.label("warmth"))
        .where(headed.c.head.is_not(None))
        .order_by(headed.c.priority.desc(), headed.c.running, headed.c.share, warmth, created_at, headed.c.head)
    )


def firsts(
    tenant: SQLColumnExpression[str] | str, priority: SQLColumnExpression[int] | int, held_base: str | None
) -> list[Select[str]]:
    """Return the queries for the first job of a line, by the values of `_warmth`: each where those before find none."""
    own = (_due(), jobs.c.tenant == tenant, jobs.c.priority == priority)
    order = (jobs.c.created_at, jobs.c.id)
    return [select(jobs.c.id).where(*own, warm).order_by(*order).limit(1) for warm in (*_warm(held_base), true())]


def positions() -> CTE:
    """Return every job that could be claimed now with its `position`: what would be claimed if no job ended meanwhile.

    The k-th job of a tenant is claimed when k - 1 more of its jobs run: what `lines` orders by is known beforehand.
    """
    of = _tenants(_lines())
    own_order = (jobs.c.priority.desc(), _warmth(None), jobs.c.created_at, jobs.c.id)
    turn = of.c.running + func.row_number().over(partition_by=jobs.c.tenant, order_by=own_order)
    columns = (jobs.c.id, jobs.c.tenant, jobs.c.priority, jobs.c.created_at, _warmth(None).label("warmth"))
    placed = (
        select(*columns, turn.label("turn"), of.c.share, of.c.max_running)
        .join(of, of.c.tenant == jobs.c.tenant)
        .where(_due(), _has_hours(of))
        .subquery("placed")
    )
    order = (placed.c.priority.desc(), *(placed.c[name] for name in ("turn", "share", "warmth", "created_at", "id")))
    return (
        select(
            placed.c.id,
            placed.c.tenant,
            placed.c.priority,
            placed.c.created_at,
            placed.c.turn,
            placed.c.share,
            func.row_number().over(order_by=order).label("position"),
        )
        .where(or_(placed.c.max_running.is_(None), placed.c.turn <= placed.c.max_running))
        .cte("positions")
        .prefix_with("MATERIALIZED")
    )


def next_position(session: Session, tenant: str, priority: int) -> int:
    """Return the position, from 1, that a job of the tenant would have if it were queued now."""
    placed, mine = positions(), jobs.alias()
    own = (mine.c.status == "queued", mine.c.tenant == tenant, mine.c.priority >= priority)
    turn = num_running(tenant) + select(func.count()).where(*own).scalar_subquery() + 1
    share = func.round(held_s(tenant, db_now() - SHARE_S) / 60)
    same = placed.c.priority == priority
    # Of equals, the younger comes last.
    ahead = or_(
        placed.c.priority > priority,
        and_(same, placed.c.turn < turn),
        and_(same, placed.c.turn == turn, placed.c.share <= share),
    )
    return int(session.scalar(select(func.count()).select_from(placed).where(ahead)) or 0) + 1


def turn(tenant: SQLColumnExpression[str], spent: Mapping[str, int]) -> ColumnElement[int]:
    """Return the ORDER BY term, as SQL, that puts the tenant with the least seconds in `spent` first."""
    return case(dict(spent), value=tenant, else_=0) if spent else literal(0)


def waits(status: str) -> ColumnElement[bool]:
    """Return the condition of the partial index of `validating` or `queued` jobs, in its words.

    SQLite uses a partial index only where a query repeats its condition with literal values; without it the choice of
    a job reads the index of all jobs that ever were.
    """
    return jobs.c.status == literal_column(f"'{status}'")


def num_running(tenant: ColumnElement[str] | str) -> ColumnElement[int]:
    """Return how many jobs of a tenant run, as SQL."""
    runs = jobs.alias()
    own = (runs.c.status == "running", runs.c.tenant == tenant)
    return select(func.count()).where(*own).scalar_subquery()


def held_s(tenant: ColumnElement[str] | str, since: ColumnElement[float]) -> ColumnElement[float]:
    """Return the seconds after `since` in which workers held jobs of a tenant, those that run included, as SQL."""
    runs = jobs.alias()
    since = once(since)
    ended = select(func.sum(usage.c.ended_at - _later(usage.c.started_at, since)))
    ended = ended.where(usage.c.tenant == tenant, usage.c.ended_at > since)
    running = select(func.sum(db_now() - _later(func.coalesce(runs.c.claimed_at, db_now()), since)))
    running = running.where(runs.c.status == "running", runs.c.tenant == tenant)
    return func.coalesce(ended.scalar_subquery(), 0.0) + func.coalesce(running.scalar_subquery(), 0.0)


def _lines() -> CTE:
    """Return each tenant and priority of which jobs are queued, in leaps through the index from one to the next."""
    before_all = (cast(literal(value), column.type).label(column.name) for value, column in _BEFORE_ALL)
    line = select(*before_all).cte("lines", recursive=True)
    found = jobs.alias("found")
    # Not by a comparison of pairs: SQLite would walk from the first job of the line that it is to leap over.
    further = (
        (jobs.c.tenant == line.c.tenant, jobs.c.priority > line.c.priority),
        (jobs.c.tenant > line.c.tenant,),
    )
    nearest = (
        select(jobs.c.id).where(waits("queued"), *beyond).order_by(jobs.c.tenant, jobs.c.priority).limit(1)
        for beyond in further
    )
    leap = line.join(found, found.c.id == func.coalesce(*(each.correlate(line).scalar_subquery() for each in nearest)))
    return line.union_all(select(found.c.tenant, found.c.priority).select_from(leap))


def _tenants(line: CTE) -> CTE:
    """Return the tenants whose jobs are queued: what they run and used, and their quotas."""
    waiting = select(line.c.tenant).where(line.c.tenant != "").distinct().subquery("waiting")
    own = waiting.c.tenant
    month_s = case((quotas.c.max_gpu_hours.is_not(None), held_s(own, db_month())))
    return (
        select(
            own,
            num_running(own).label("running"),
            # Whole minutes, so that equal tenants are equal, and age decides.
            func.round(held_s(own, db_now() - SHARE_S) / 60).label("share"),
            month_s.label("month_s"),
            quotas.c.max_running,
            quotas.c.max_gpu_hours,
        )
        .outerjoin(quotas, quotas.c.tenant == own)
        .cte("tenants")
        # Else SQLite sums a tenant's use anew for each of its jobs.
        .prefix_with("MATERIALIZED")
    )


def _due() -> ColumnElement[bool]:
    return and_(waits("queued"), jobs.c.not_before <= db_now(), jobs.c.hold_until <= db_now())


def _has_hours(of: CTE) -> ColumnElement[bool]:
    return or_(of.c.max_gpu_hours.is_(None), of.c.month_s < of.c.max_gpu_hours * HOUR_S)


def _warmth(held_base: str | None) -> ColumnElement[int]:
    """Return which of the conditions of `_warm` a job meets first, as its number, or how many they are."""
    conditions = _warm(held_base)
    return case(*((condition, number) for number, condition in enumerate(conditions)), else_=len(conditions))


def _warm(held_base: str | None) -> tuple[ColumnElement[bool], ...]:
    """Return what puts a job before others of its line, the strongest first."""
    return _long_waited(), jobs.c.base_id == (held_base or "")


def _long_waited() -> ColumnElement[bool]:
    return jobs.c.queued_at < db_now() - PREFER_HELD_BASE_S


def _later(one: ColumnElement[float], other: ColumnElement[float]) -> ColumnElement[float]:
    return case((one > other, one), else_=other)
