"""Webhooks as they are asked for and shown, and what they are told: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from common.schemas.values import Strict, Text

WebhookEvent = Literal[
    "job.validating",
    "job.queued",
    "job.running",
    "job.paused",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
]
PING = "webhook.ping"

DeliveryState = Literal["pending", "delivered", "failed"]


def _once(value: list[str]) -> list[str]:
    if len(set(value)) != len(value):
        raise ValueError("names an event twice")
    return value


Url = Annotated[Text, Field(min_length=1, max_length=2048)]
Events = Annotated[list[WebhookEvent], Field(min_length=1, max_length=16), AfterValidator(_once)]
Description = Annotated[Text, Field(max_length=200)]


class WebhookCreate(Strict):
    """The body of `POST /webhooks`. Without `events`, the URL is told of every change of a job's status."""

    url: Url
    events: Events | None = None
    description: Description = ""


class WebhookChange(Strict):
    """The body of `PATCH /webhooks/{id}`: what is left out stays; `events` null is every event."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = None

    @model_validator(mode="after")
    def _changes_a_field(self) -> WebhookChange:
        if not self.model_fields_set:
            raise ValueError("name at least one of url, events, description and enabled")
        empty = [name for name in ("url", "description", "enabled") if name in self.model_fields_set]
        for name in empty:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: null is no value; leave it out to keep it")
        return self


class WebhookRead(BaseModel):
    """A webhook without its secret. `events` null: every event."""

    id: str
    url: str
    description: str
    events: list[WebhookEvent] | None
    enabled: bool
    disabled_reason: str | None
    created_at: datetime
    last_success_at: datetime | None


class WebhookCreated(WebhookRead):
    """A webhook with a secret that is new. `secret` is shown this once."""

    secret: str


class WebhookList(BaseModel):
    """Every webhook of the tenant, newest first."""

    data: list[WebhookRead]
    has_more: bool = False
    next: str | None = None


class Delivery(BaseModel):
    """One event for one webhook. `id` is the header `webhook-id`, the same at every attempt; `payload` is the body.

    `next_attempt_at` is told while it is pending; `response_status` and `error` are those of the last attempt.
    """

    id: str
    type: str
    job: str | None
    state: DeliveryState
    attempts: int
    response_status: int | None
    error: str | None
    created_at: datetime
    next_attempt_at: datetime | None
    ended_at: datetime | None
    payload: dict[str, Any]


class DeliveryList(BaseModel):
    """One page of deliveries, newest first; `next` is the value of `after` for the next page."""

    data: list[Delivery]
    has_more: bool
    next: str | None
