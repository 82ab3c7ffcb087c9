"""Quotas: what a tenant may use and uses; an administrator sets them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from api.auth import AuthenticatedRoute, bearer
from api.deps import Administrator, Reading, WhoCalls, Writing, own_tenant
from api.documentation import problem_answers
from common.jobs import quotas
from common.schemas.quotas import Quota, QuotaLimits

router = APIRouter(prefix="/quota", tags=["quota"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)])

_TENANT = r"^[a-z0-9][a-z0-9-]{0,62}$"
Tenant = Annotated[str | None, Query(pattern=_TENANT, description="Another tenant; administrators only.")]


@router.get("", responses=problem_answers(403))
def read_quota(session: Reading, who: WhoCalls, tenant: Tenant = None) -> Quota:
    """Read what the tenant may use, and what it uses now."""
    return quotas.read(session, own_tenant(who, tenant))


@router.put("", responses=problem_answers(403, 413, 415))
def set_quota(limits: QuotaLimits, session: Writing, who: Administrator, tenant: Tenant = None) -> Quota:
    """Set every limit of a tenant; one that is left out is lifted. Jobs that run go on."""
    chosen = tenant or who.tenant
    quotas.write(session, chosen, limits)
    return quotas.read(session, chosen)
