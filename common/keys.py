"""API keys: made, checked and revoked. Only the SHA-256 is stored; the key is shown once."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from common.db.engine import clock, db_now
from common.db.rows import ApiKeyRow
from common.errors import InvalidInput, NotFound, Unauthenticated
from common.ids import new_id

DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
# `last_used_at` is for people: writing it at every request would make each read a write.
_USED_EVERY_S = 60.0


@dataclass(frozen=True)
class Caller:
    """Who makes a request."""

    key_id: str
    tenant: str
    admin: bool


def create(session: Session, *, name: str, tenant: str, admin: bool = False) -> tuple[ApiKeyRow, str]:
    """Insert a key of 256 random bits and return its row and the key itself, which cannot be shown again.

    Raises:
        InvalidInput: the tenant is no plain lower-case name (it becomes a part of object keys).
    """
    if not _TENANT.fullmatch(tenant) or tenant == "datasets":
        raise InvalidInput("tenant: use 1 to 63 lower-case letters, digits and dashes", param="tenant")
    key = f"tnr_{secrets.token_urlsafe(32)}"
    row = ApiKeyRow(
        id=new_id("key"),
        tenant=tenant,
        name=name,
        hint=f"{key[:8]}…",
        sha256=_hash(key),
        admin=admin,
        created_at=clock(session),
    )
    session.add(row)
    session.flush()
    return row, key


def identify(session: Session, key: str) -> Caller:
    """Return who holds `key`.

    Raises:
        Unauthenticated: the key is unknown or revoked.
    """
    row = _valid(session, ApiKeyRow.sha256 == _hash(key))
    return Caller(row.id, row.tenant, row.admin)


def check(session: Session, who: Caller) -> None:
    """Raise Unauthenticated where the key of a caller who was let in earlier was revoked since."""
    _valid(session, ApiKeyRow.id == who.key_id)


def _valid(session: Session, condition: ColumnElement[bool]) -> ApiKeyRow:
    row = session.scalar(select(ApiKeyRow).where(condition, ApiKeyRow.revoked_at.is_(None)))
    if row is None:
        raise Unauthenticated(
            "the API key is not known, or was revoked",
            hint="Set TUNERY_API_KEY, or send `Authorization: Bearer <key>`; `tunery keys create` makes a key.",
        )
    return row


def touch(session: Session, key_id: str) -> None:
    """Note that a key was used, at most once a minute."""
    stale = (ApiKeyRow.last_used_at.is_(None)) | (ApiKeyRow.last_used_at < db_now() - _USED_EVERY_S)
    session.execute(
        update(ApiKeyRow)
        .where(ApiKeyRow.id == key_id, stale)
        .values(last_used_at=db_now())
        .execution_options(synchronize_session=False)
    )


def listed(session: Session, tenant: str) -> list[ApiKeyRow]:
    """Return the keys of a tenant, newest first."""
    return list(session.scalars(select(ApiKeyRow).where(ApiKeyRow.tenant == tenant).order_by(ApiKeyRow.id.desc())))


def revoke(session: Session, tenant: str, key_id: str) -> ApiKeyRow:
    """Revoke a key of a tenant at once; revoking it again changes nothing.

    Raises:
        NotFound: no such key in this tenant.
    """
    row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.tenant == tenant, ApiKeyRow.id == key_id))
    if row is None:
        raise NotFound("there is no such key", param="id", hint="`tunery keys list` (GET /keys) lists them.")
    if row.revoked_at is None:
        row.revoked_at = clock(session)
        session.flush()
    return row


def ensure_first_key(session: Session, path: Path) -> None:
    """Make sure that the file at `path` (mode 0600) holds an administrator's key that is valid."""
    if path.exists():
        try:
            identify(session, path.read_text().strip())
            return
        except Unauthenticated:
            path.unlink()
    _, key = create(session, name="first key", tenant=DEFAULT_TENANT, admin=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(f"{key}\n")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
