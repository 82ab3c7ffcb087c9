"""What a tenant may use: jobs that run and wait, GPU hours of a calendar month (UTC), and the highest priority.

A job too many to run, or one beyond the hours, waits; one too many to wait is refused when it is submitted.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from common.db.engine import db_month
from common.db.rows import JobRow, QuotaRow
from common.errors import InvalidInput, OverQuota
from common.jobs import line
from common.schemas.quotas import Quota, QuotaLimits

WAITING = ("validating", "queued", "paused")


def read(session: Session, tenant: str) -> Quota:
    """Return a tenant's limits and what it uses now."""
    row = session.get(QuotaRow, tenant)
    limits = {name: getattr(row, name) if row else None for name in QuotaLimits.model_fields}
    usage = select(line.num_running(tenant), _num_waiting(tenant), line.held_s(tenant, db_month()) / line.HOUR_S)
    running, queued, hours = session.execute(usage).one()
    return Quota(tenant=tenant, **limits, running=running, queued=queued, gpu_hours=round(hours, 4))


def write(session: Session, tenant: str, limits: QuotaLimits) -> None:
    """Set a tenant's limits, all of them."""
    session.merge(QuotaRow(tenant=tenant, **limits.model_dump()))
    session.flush()


def admit(session: Session, tenant: str, priority: int) -> None:
    """Raise unless the tenant may submit one more job of that priority. Nobody else admits until the transaction ends.

    Raises:
        OverQuota: as many jobs wait as may.
        InvalidInput: the priority is above the tenant's highest.
    """
    row = session.scalar(select(QuotaRow).where(QuotaRow.tenant == tenant).with_for_update())
    if row is None:
        return
    check_priority(session, tenant, priority)
    if row.max_queued is not None and (waiting := session.scalar(select(_num_waiting(tenant))) or 0) >= row.max_queued:
        raise OverQuota(
            f"{waiting} jobs of your tenant wait already, and {row.max_queued} may",
            code="quota_queued",
            hint="Wait until one of them runs, cancel one, or ask the operator for more (`tunery quota`, GET /quota).",
        )


def has_place(session: Session, tenant: str) -> bool:
    """Return whether one more job of the tenant may run. Nobody else starts one until the transaction ends."""
    limit = session.scalar(select(QuotaRow.max_running).where(QuotaRow.tenant == tenant).with_for_update())
    return limit is None or (session.scalar(select(line.num_running(tenant))) or 0) < limit


def check_priority(session: Session, tenant: str, priority: int) -> None:
    """Raise InvalidInput where a priority is above what the tenant may give."""
    highest = session.scalar(select(QuotaRow.max_priority).where(QuotaRow.tenant == tenant))
    if highest is not None and priority > highest:
        raise InvalidInput(
            f"priority: {priority} is above {highest}, the highest of your tenant",
            param="priority",
            code="quota_priority",
            hint="Lower it, or ask the operator for more (`tunery quota`, GET /quota).",
        )


def _num_waiting(tenant: str) -> ColumnElement[int]:
    waiting = (JobRow.tenant == tenant, JobRow.status.in_(WAITING))
    return select(func.count()).where(*waiting).scalar_subquery()
