"""`client.webhooks`: where the tenant's events are told, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from common.client import requests
from common.client.pages import Page
from common.client.requests import WebhookFields
from common.client.transport import AsyncTransport, Transport
from common.schemas.webhooks import Delivery, WebhookCreated, WebhookRead


class Webhooks:
    """Webhooks of the key's tenant."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def create(self, url: str, *, events: Sequence[str] | None = None, description: str = "") -> WebhookCreated:
        """Make a webhook, which is told of these events or of all; its `secret` is shown this once."""
        return self._transport.send(requests.create_webhook(url, events, description))

    def list(self) -> Page[WebhookRead]:
        """Return the webhooks, without their secrets."""
        page = self._transport.send(requests.list_webhooks())
        return Page(page.data, page.has_more, page.next)

    def get(self, webhook: str) -> WebhookRead:
        """Return one webhook."""
        return self._transport.send(requests.get_webhook(webhook))

    def change(self, webhook: str, **fields: Unpack[WebhookFields]) -> WebhookRead:
        """Change a webhook's URL, events (None: all) or description, or switch it on or off (`enabled`)."""
        return self._transport.send(requests.change_webhook(webhook, fields))

    def delete(self, webhook: str) -> None:
        """Remove a webhook and its deliveries."""
        self._transport.send(requests.delete_webhook(webhook))

    def rotate(self, webhook: str, *, overlap_s: int | None = None) -> WebhookCreated:
        """Give a webhook a new `secret`; the old one signs too for `overlap_s` seconds (a day where it is left out)."""
        return self._transport.send(requests.rotate_webhook(webhook, overlap_s))

    def ping(self, webhook: str) -> Delivery:
        """Send a message that says nothing."""
        return self._transport.send(requests.ping_webhook(webhook))

    def deliveries(
        self, webhook: str, *, state: str | None = None, limit: int | None = None, after: str | None = None
    ) -> Page[Delivery]:
        """Return one page of deliveries, newest first: pending, delivered, failed, or all."""
        page = self._transport.send(requests.list_deliveries(webhook, state, limit, after))
        return Page(page.data, page.has_more, page.next)

    def delivery(self, webhook: str, delivery: str) -> Delivery:
        """Return one delivery."""
        return self._transport.send(requests.get_delivery(webhook, delivery))

    def redeliver(self, webhook: str, delivery: str) -> Delivery:
        """Send a delivery again, with the id that it had."""
        return self._transport.send(requests.redeliver(webhook, delivery))


class AsyncWebhooks:
    """Webhooks of the key's tenant."""

    def __init__(self, transport: AsyncTransport):
        self._transport = transport

    async def create(self, url: str, *, events: Sequence[str] | None = None, description: str = "") -> WebhookCreated:
        """Make a webhook, which is told of these events or of all; its `secret` is shown this once."""
        return await self._transport.send(requests.create_webhook(url, events, description))

    async def list(self) -> Page[WebhookRead]:
        """Return the webhooks, without their secrets."""
        page = await self._transport.send(requests.list_webhooks())
        return Page(page.data, page.has_more, page.next)

    async def get(self, webhook: str) -> WebhookRead:
        """Return one webhook."""
        return await self._transport.send(requests.get_webhook(webhook))

    async def change(self, webhook: str, **fields: Unpack[WebhookFields]) -> WebhookRead:
        """Change a webhook's URL, events (None: all) or description, or switch it on or off (`enabled`)."""
        return await self._transport.send(requests.change_webhook(webhook, fields))

    async def delete(self, webhook: str) -> None:
        """Remove a webhook and its deliveries."""
        await self._transport.send(requests.delete_webhook(webhook))

    async def rotate(self, webhook: str, *, overlap_s: int | None = None) -> WebhookCreated:
        """Give a webhook a new `secret`; the old one signs too for `overlap_s` seconds (a day where it is left out)."""
        return await self._transport.send(requests.rotate_webhook(webhook, overlap_s))

    async def ping(self, webhook: str) -> Delivery:
        """Send a message that says nothing."""
        return await self._transport.send(requests.ping_webhook(webhook))

    async def deliveries(
        self, webhook: str, *, state: str | None = None, limit: int | None = None, after: str | None = None
    ) -> Page[Delivery]:
        """Return one page of deliveries, newest first: pending, delivered, failed, or all."""
        page = await self._transport.send(requests.list_deliveries(webhook, state, limit, after))
        return Page(page.data, page.has_more, page.next)

    async def delivery(self, webhook: str, delivery: str) -> Delivery:
        """Return one delivery."""
        return await self._transport.send(requests.get_delivery(webhook, delivery))

    async def redeliver(self, webhook: str, delivery: str) -> Delivery:
        """Send a delivery again, with the id that it had."""
        return await self._transport.send(requests.redeliver(webhook, delivery))
