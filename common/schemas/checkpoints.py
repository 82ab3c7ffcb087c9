"""Checkpoints as they are shown: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class Checkpoint(BaseModel):
    """A complete checkpoint of a job. `attempt` counts as the job's does; 0: it is the job's that this one retries."""

    step: int
    attempt: int
    bytes: int
    manifest_sha256: str
    created_at: datetime


class CheckpointList(BaseModel):
    """Every checkpoint of a job, the highest step first."""

    data: list[Checkpoint]
