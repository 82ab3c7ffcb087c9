"""Checkpoints as they are shown: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class Checkpoint(BaseModel):
    """A complete checkpoint of a job. `attempt` is the attempt that wrote it."""

    step: int
    attempt: int
    bytes: int
    manifest_sha256: str
    created_at: datetime


class CheckpointList(BaseModel):
    """Every checkpoint of a job, the highest step first."""

    data: list[Checkpoint]
