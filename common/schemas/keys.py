"""API keys as they are asked for and shown: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class KeyCreate(BaseModel):
    """The body of `POST /keys`. Without a tenant, the key belongs to the caller's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
    tenant: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] | None = None


class KeyRead(BaseModel):
    """A key without its secret; `hint` is its first characters, to tell keys apart."""

    id: str
    name: str
    tenant: str
    hint: str
    created_at: datetime
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


class KeyCreated(KeyRead):
    """A new key. `key` is shown this once: only its hash is stored."""

    key: str


class KeyList(BaseModel):
    """Every key of the tenant, newest first."""

    data: list[KeyRead]
    has_more: bool = False
    next: str | None = None
