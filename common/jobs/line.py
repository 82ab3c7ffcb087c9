"""The order in which queued jobs are claimed, written once: `claim` takes the first of it, `standing` counts along it.

Priority comes first, then the tenant with the fewest running jobs, then the one whose jobs held workers for the fewest
minutes of the past day (so that a single worker is shared too), then age. A tenant at one of its quotas stands outside.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    func,
    literal,
    literal_column,
    or_,
    select,
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


def first(held_base: str | None) -> Select[Any]:
    """Return the choice (id, tenant, max_running) of the job that a worker which holds `held_base` claims now.

    Rows that another transaction holds are passed over.
    """
    of = _tenants()
    has_place = or_(of.c.max_running.is_(None), of.c.running < of.c.max_running)
    return (
        select(jobs.c.id, jobs.c.tenant, of.c.max_running)
        .join(of, of.c.tenant == jobs.c.tenant)
        .where(_due(), _has_hours(of), has_place)
        .order_by(jobs.c.priority.desc(), of.c.running, of.c.share, _warmth(held_base), jobs.c.created_at, jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=jobs)
    )


def positions() -> CTE:
    """Return every job that could be claimed now with its `position`: what would be claimed if no job ended meanwhile.

    The k-th job of a tenant is claimed when k - 1 more of its jobs run: what `first` orders by is known beforehand.
    """
    of = _tenants()
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


def waiting_status() -> ColumnElement[bool]:
    """Return the condition of the partial index `jobs_to_claim`, in its words.

    SQLite uses a partial index only where a query repeats its condition with literal values; without it the choice of
    a job reads the index of all jobs that ever were.
    """
    return jobs.c.status.in_([literal_column("'validating'"), literal_column("'queued'")])


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


def _tenants() -> CTE:
    """Return the tenants whose jobs are queued: what they run and used, and their quotas."""
    waiting = select(jobs.c.tenant).where(jobs.c.status == "queued", waiting_status()).distinct().subquery("waiting")
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
    return and_(
        jobs.c.status == "queued", waiting_status(), jobs.c.not_before <= db_now(), jobs.c.hold_until <= db_now()
    )


def _has_hours(of: CTE) -> ColumnElement[bool]:
    return or_(of.c.max_gpu_hours.is_(None), of.c.month_s < of.c.max_gpu_hours * HOUR_S)


def _warmth(held_base: str | None) -> ColumnElement[int]:
    long_waited = jobs.c.queued_at < db_now() - PREFER_HELD_BASE_S
    return case((long_waited, 0), (jobs.c.base_id == (held_base or ""), 1), else_=2)


def _later(one: ColumnElement[float], other: ColumnElement[float]) -> ColumnElement[float]:
    return case((one > other, one), else_=other)
