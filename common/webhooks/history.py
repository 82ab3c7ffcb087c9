"""Deliveries as they are shown, and told once more."""

from __future__ import annotations

import json

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from common.clock import moment
from common.db.engine import db_now
from common.db.rows import DeliveryRow, WebhookRow
from common.errors import NotFound, WrongState
from common.schemas.webhooks import Delivery, DeliveryList


def page(
    session: Session, webhook_id: str, *, state: str | None = None, after: str | None = None, limit: int = 20
) -> DeliveryList:
    """Return deliveries of a webhook, newest first, older than the id `after`. The caller has checked the tenant."""
    query = select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id)
    if state is not None:
        query = query.where(DeliveryRow.state == state)
    if after is not None:
        query = query.where(DeliveryRow.id < after)
    found = list(session.scalars(query.order_by(DeliveryRow.id.desc()).limit(limit + 1)))
    data = [_shown(row) for row in found[:limit]]
    more = len(found) > limit
    return DeliveryList(data=data, has_more=more, next=data[-1].id if more else None)


def one(session: Session, webhook_id: str, delivery_id: str) -> Delivery:
    """Return a delivery of a webhook.

    Raises:
        NotFound: the webhook has no such delivery.
    """
    row = session.scalar(select(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id, DeliveryRow.id == delivery_id))
    if row is None:
        raise NotFound(
            "there is no such delivery", param="delivery_id", hint="GET /webhooks/{id}/deliveries lists them."
        )
    return _shown(row)


def redeliver(session: Session, webhook: WebhookRow, delivery_id: str) -> Delivery:
    """Send a delivery again as soon as possible, with its old id, and its schedule from the beginning.

    Raises:
        NotFound: the webhook has no such delivery.
        WrongState: the webhook is disabled, or the delivery is being made at this moment.
    """
    check_enabled(webhook)
    one(session, webhook.id, delivery_id)
    leased = DeliveryRow.lease_expires_at.is_not(None) & (DeliveryRow.lease_expires_at > db_now())
    again = {"state": "pending", "next_at": db_now(), "failures": 0, "ended_at": None, "lease_expires_at": None}
    statement = update(DeliveryRow).where(DeliveryRow.id == delivery_id, ~leased).values(again)
    if session.execute(statement.returning(DeliveryRow.id)).one_or_none() is None:
        raise WrongState("this delivery is being made right now", code="delivery_under_way")
    session.expire_all()
    return one(session, webhook.id, delivery_id)


def check_enabled(webhook: WebhookRow) -> None:
    """Raise unless something would be sent to the webhook.

    Raises:
        WrongState: it is disabled.
    """
    if webhook.disabled_at is not None:
        raise WrongState(
            f"the webhook is disabled: {webhook.disabled_reason}",
            code="webhook_disabled",
            hint='PATCH /webhooks/{id} with {"enabled": true} switches it on.',
        )


def _shown(row: DeliveryRow) -> Delivery:
    return Delivery(
        id=row.id,
        type=row.type,
        job=row.job_id,
        state=row.state,
        attempts=row.attempts,
        response_status=row.answer,
        error=row.error,
        created_at=moment(row.created_at),
        next_attempt_at=moment(row.next_at) if row.state == "pending" else None,
        ended_at=None if row.ended_at is None else moment(row.ended_at),
        payload=json.loads(row.body),
    )
