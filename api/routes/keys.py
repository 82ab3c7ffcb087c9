"""API keys of the caller's tenant; an administrator may name another."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from api.auth import AuthenticatedRoute, bearer
from api.deps import Reading, WhoCalls, Writing, own_tenant
from api.documentation import problem_answers
from common import keys
from common.clock import moment
from common.db.rows import ApiKeyRow
from common.schemas.keys import KeyCreate, KeyCreated, KeyList, KeyRead

router = APIRouter(prefix="/keys", tags=["keys"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)])

Tenant = Annotated[
    str | None,
    Query(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Another tenant's keys; administrators only."),
]


@router.post("", status_code=201, responses=problem_answers(403, 413, 415))
def create_key(body: KeyCreate, session: Writing, who: WhoCalls) -> KeyCreated:
    """Make a key. It is shown this once: only its hash is stored."""
    row, key = keys.create(session, name=body.name, tenant=own_tenant(who, body.tenant))
    return KeyCreated(**_shown(row).model_dump(), key=key)


@router.get("", responses=problem_answers(403))
def list_keys(session: Reading, who: WhoCalls, tenant: Tenant = None) -> KeyList:
    """List the keys of the tenant, newest first."""
    return KeyList(data=[_shown(row) for row in keys.listed(session, own_tenant(who, tenant))])


@router.delete("/{key_id}", status_code=204, responses=problem_answers(403, 404))
def revoke_key(key_id: str, session: Writing, who: WhoCalls, tenant: Tenant = None) -> None:
    """Revoke a key at once."""
    keys.revoke(session, own_tenant(who, tenant), key_id)


def _shown(row: ApiKeyRow) -> KeyRead:
    return KeyRead(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        hint=row.hint,
        created_at=moment(row.created_at),
        last_used_at=None if row.last_used_at is None else moment(row.last_used_at),
        revoked_at=None if row.revoked_at is None else moment(row.revoked_at),
    )
