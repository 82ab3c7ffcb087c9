"""Quotas of tenants as they are set and shown: shared by API, client and command."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from common.schemas.values import Strict

_Count = Annotated[int, Field(ge=0, le=1_000_000)]


class QuotaLimits(Strict):
    """The body of `PUT /quota`: every limit of a tenant; null is no limit.

    `max_queued` counts each job that waits: in its check, in the queue or paused. The GPU hours are those of a calendar
    month (UTC) in which workers hold the tenant's jobs.
    """

    max_running: _Count | None = None
    max_queued: _Count | None = None
    max_gpu_hours: Annotated[float, Field(ge=0, le=1e9)] | None = None
    max_priority: Annotated[int, Field(ge=-100, le=100)] | None = None


class Quota(BaseModel):
    """What a tenant may use (null: no limit), and what it uses now."""

    tenant: str
    max_running: int | None
    max_queued: int | None
    max_gpu_hours: float | None
    max_priority: int | None
    running: int
    queued: int
    gpu_hours: float
