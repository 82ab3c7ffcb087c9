"""Webhooks of the caller's tenant, and what became of each delivery."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading, WhoCalls, Writing
from api.documentation import problem_answers
from common.clock import moment
from common.db.rows import WebhookRow
from common.schemas.webhooks import (
    Delivery,
    DeliveryList,
    DeliveryState,
    WebhookChange,
    WebhookCreate,
    WebhookCreated,
    WebhookList,
    WebhookRead,
)
from common.webhooks import history, outbox, registry

router = APIRouter(
    prefix="/webhooks", tags=["webhooks"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)

Overlap = Annotated[
    int, Query(ge=0, le=7 * 86_400, description="Seconds for which the old secret signs too; 0 if it has leaked.")
]


@router.post("", status_code=201, responses=problem_answers(409, 413, 415))
def create_webhook(body: WebhookCreate, context: Installation, session: Writing, who: WhoCalls) -> WebhookCreated:
    """Make a webhook. Its secret is shown this once."""
    return _with_secret(registry.create(session, context.settings, who.tenant, body))


@router.get("")
def list_webhooks(session: Reading, who: WhoCalls) -> WebhookList:
    """List the webhooks of the tenant, newest first."""
    return WebhookList(data=[_shown(row) for row in registry.listed(session, who.tenant)])


@router.get("/{webhook_id}", responses=problem_answers(404))
def read_webhook(webhook_id: str, session: Reading, who: WhoCalls) -> WebhookRead:
    """Read a webhook."""
    return _shown(registry.own(session, who.tenant, webhook_id))


@router.patch("/{webhook_id}", responses=problem_answers(404, 413, 415))
def change_webhook(
    webhook_id: str, body: WebhookChange, context: Installation, session: Writing, who: WhoCalls
) -> WebhookRead:
    """Change what a webhook is told and where, or switch it on or off. Off, what was still to be told is given up."""
    return _shown(registry.change(session, context.settings, who.tenant, webhook_id, body))


@router.delete("/{webhook_id}", status_code=204, responses=problem_answers(404))
def delete_webhook(webhook_id: str, session: Writing, who: WhoCalls) -> None:
    """Remove a webhook and its deliveries."""
    registry.remove(session, who.tenant, webhook_id)


@router.post("/{webhook_id}/rotate", responses=problem_answers(404))
def rotate_webhook_secret(
    webhook_id: str, session: Writing, who: WhoCalls, overlap_s: Overlap = 86_400
) -> WebhookCreated:
    """Give a webhook a new secret, shown this once; for a while messages carry signatures of both."""
    return _with_secret(registry.rotate(session, who.tenant, webhook_id, overlap_s))


@router.post("/{webhook_id}/ping", status_code=202, responses=problem_answers(404, 409))
def ping_webhook(webhook_id: str, session: Writing, who: WhoCalls) -> Delivery:
    """Send a message of the type `webhook.ping`; its delivery says what came of it."""
    row = registry.own(session, who.tenant, webhook_id)
    history.check_enabled(row)
    return history.one(session, row.id, outbox.ping(session, row.id))


@router.get("/{webhook_id}/deliveries", responses=problem_answers(404))
def list_webhook_deliveries(
    webhook_id: str,
    session: Reading,
    who: WhoCalls,
    state: Annotated[DeliveryState | None, Query()] = None,
    after: Annotated[str | None, Query(pattern=r"^\w{1,40}$", description="The last page's `next`.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> DeliveryList:
    """List deliveries, newest first: those that wait, and those that ended within 30 days."""
    row = registry.own(session, who.tenant, webhook_id)
    return history.page(session, row.id, state=state, after=after, limit=limit)


@router.get("/{webhook_id}/deliveries/{delivery_id}", responses=problem_answers(404))
def read_webhook_delivery(webhook_id: str, delivery_id: str, session: Reading, who: WhoCalls) -> Delivery:
    """Read a delivery."""
    return history.one(session, registry.own(session, who.tenant, webhook_id).id, delivery_id)


@router.post("/{webhook_id}/deliveries/{delivery_id}/redeliver", status_code=202, responses=problem_answers(404, 409))
def redeliver_webhook(webhook_id: str, delivery_id: str, session: Writing, who: WhoCalls) -> Delivery:
    """Send a delivery again, with the id that it had: a receiver that knows it may ignore it."""
    return history.redeliver(session, registry.own(session, who.tenant, webhook_id), delivery_id)


def _shown(row: WebhookRow) -> WebhookRead:
    return WebhookRead(
        id=row.id,
        url=row.url,
        description=row.description,
        events=row.events,
        enabled=row.disabled_at is None,
        disabled_reason=row.disabled_reason,
        created_at=moment(row.created_at),
        last_success_at=None if row.last_success_at is None else moment(row.last_success_at),
    )


def _with_secret(row: WebhookRow) -> WebhookCreated:
    return WebhookCreated(**_shown(row).model_dump(), secret=row.secret)
