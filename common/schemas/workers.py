"""Workers and the base models at hand as they are shown: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel

WorkerState = Literal["idle", "busy", "draining", "gone"]


class Worker(BaseModel):
    """A worker process. `gone` means that it has left, or has not been heard for half a minute.

    `vram_bytes` is the whole memory of its card, `free_bytes` what others left of it when the worker last held nothing
    there; null where the driver does not say.
    """

    id: str
    name: str
    kind: str
    state: WorkerState
    device: str | None = None
    device_name: str | None = None
    vram_bytes: int | None = None
    free_bytes: int | None = None
    base_model: str | None = None
    job: str | None = None
    heartbeat_at: datetime
    started_at: datetime


class WorkerList(BaseModel):
    """Every worker that was seen lately; one page, unless `next` says otherwise."""

    data: list[Worker]
    has_more: bool = False
    next: str | None = None


class BaseModelInfo(BaseModel):
    """A base model that needs no hub. `id` is the value of a job's `model`; `source` is the folder's kind."""

    id: str
    name: str | None = None
    revision: str | None = None
    source: str
    bytes: int | None = None


class BaseModelList(BaseModel):
    """Base models that this installation already holds."""

    data: list[BaseModelInfo]
    has_more: bool = False
    next: str | None = None
