"""Where each tenant wants to be told: webhooks made, changed, switched off and removed."""

from __future__ import annotations

from urllib.parse import urlsplit

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from common import addresses
from common.db.engine import clock, db_now
from common.db.locks import lock
from common.db.rows import DeliveryRow, WebhookRow
from common.errors import InvalidInput, NotFound, WrongState
from common.ids import new_id
from common.schemas.webhooks import WebhookChange, WebhookCreate
from common.settings import Settings
from common.webhooks import signing

MOST = 20
GONE = "the receiver answered 410 Gone"
FAILING = "nothing could be delivered any more"
SWITCHED_OFF = "switched off"


def create(session: Session, settings: Settings, tenant: str, asked: WebhookCreate) -> WebhookRow:
    """Insert a webhook with a new secret.

    Raises:
        InvalidInput: the URL may not be called.
        WrongState: the tenant has as many webhooks as it may have.
    """
    check_url(asked.url, settings)
    lock(session, f"webhooks of {tenant}")
    if (session.scalar(select(func.count()).where(WebhookRow.tenant == tenant)) or 0) >= MOST:
        raise WrongState(
            f"there are {MOST} webhooks already",
            code="too_many_webhooks",
            hint="Remove one with DELETE /webhooks/{id}.",
        )
    row = WebhookRow(
        id=new_id("wh"),
        tenant=tenant,
        url=asked.url,
        description=asked.description,
        events=asked.events,
        secret=signing.new_secret(),
        created_at=clock(session),
    )
    session.add(row)
    session.flush()
    return row


def listed(session: Session, tenant: str) -> list[WebhookRow]:
    """Return the webhooks of a tenant, newest first."""
    return list(session.scalars(select(WebhookRow).where(WebhookRow.tenant == tenant).order_by(WebhookRow.id.desc())))


def own(session: Session, tenant: str, webhook_id: str) -> WebhookRow:
    """Return a webhook of the tenant.

    Raises:
        NotFound: no such webhook in this tenant.
    """
    row = session.scalar(select(WebhookRow).where(WebhookRow.tenant == tenant, WebhookRow.id == webhook_id))
    if row is None:
        raise NotFound(
            "there is no such webhook",
            param="id",
            hint="`tunery webhooks list` (GET /webhooks) lists those of your key's tenant.",
        )
    return row


def change(session: Session, settings: Settings, tenant: str, webhook_id: str, asked: WebhookChange) -> WebhookRow:
    """Change what a webhook is told, where, and whether at all.

    Raises:
        InvalidInput: the URL may not be called.
        NotFound: no such webhook in this tenant.
    """
    row = own(session, tenant, webhook_id)
    if asked.url is not None:
        check_url(asked.url, settings)
        row.url = asked.url
    if "events" in asked.model_fields_set:
        row.events = None if asked.events is None else [*asked.events]
    if asked.description is not None:
        row.description = asked.description
    if asked.enabled is not None and asked.enabled != (row.disabled_at is None):
        if asked.enabled:
            row.disabled_at = row.disabled_reason = None
        else:
            disable(session, webhook_id, SWITCHED_OFF)
            session.refresh(row)
    session.flush()
    return row


def rotate(session: Session, tenant: str, webhook_id: str, overlap_s: float) -> WebhookRow:
    """Give a webhook a new secret; for `overlap_s` the old one signs too.

    Raises:
        NotFound: no such webhook in this tenant.
    """
    row = own(session, tenant, webhook_id)
    row.old_secret, row.secret = (row.secret if overlap_s else None), signing.new_secret()
    row.old_secret_until = clock(session) + overlap_s if overlap_s else None
    session.flush()
    return row


def remove(session: Session, tenant: str, webhook_id: str) -> None:
    """Remove a webhook and its deliveries.

    Raises:
        NotFound: no such webhook in this tenant.
    """
    session.delete(own(session, tenant, webhook_id))
    session.flush()


def disable(session: Session, webhook_id: str, reason: str) -> None:
    """Switch a webhook off and give up what it was still to be told."""
    off = {"disabled_at": func.coalesce(WebhookRow.disabled_at, db_now()), "disabled_reason": reason}
    session.execute(update(WebhookRow).where(WebhookRow.id == webhook_id).values(off))
    waiting = (DeliveryRow.webhook_id == webhook_id) & (DeliveryRow.state == "pending")
    given_up = {"state": "failed", "ended_at": db_now(), "lease_expires_at": None, "error": f"not sent: {reason}"}
    session.execute(update(DeliveryRow).where(waiting).values(given_up))


def check_url(url: str, settings: Settings) -> None:
    """Raise unless the URL may be called, as far as its spelling tells; its host is resolved at each delivery.

    Raises:
        InvalidInput: it may not, or is malformed.
    """
    if not url.isascii() or any(ord(character) <= 32 or ord(character) == 127 for character in url):
        raise _refusal("the URL has characters that must be written as %XX (hosts: as xn--…)")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
        known = addresses.spelled(host)
        public = addresses.spelled_allowed(host, settings)
    except ValueError as error:
        raise _refusal(f"the URL is malformed ({error})") from error
    if parts.scheme not in ("https", "http") or not host or port == 0:
        raise _refusal("write https://host/path")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise _refusal("the URL holds a user name, a password or a fragment")
    ask = "Ask the operator to list the network in TUNERY_FETCH_NETWORKS."
    if not public:
        raise _refusal(f"{host} is not a public address", ask, "private_address")
    if parts.scheme == "http" and not (known is not None and addresses.listed(known, settings)):
        # What is sent is signed, not encrypted.
        raise _refusal("http is for addresses in the operator's own networks; elsewhere use https", ask, "webhook_http")


def _refusal(message: str, hint: str | None = None, code: str = "webhook_url") -> InvalidInput:
    return InvalidInput(f"url: {message}", param="url", hint=hint, code=code)
