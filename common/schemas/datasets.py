"""Uploaded datasets as they are shown: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class Dataset(BaseModel):
    """An uploaded file. `uri` is what a job names as its `dataset`."""

    id: str
    name: str
    bytes: int
    sha256: str
    uri: str
    created_at: datetime


class DatasetList(BaseModel):
    """One page of datasets, newest first; `next` is the value of `after` for the next page."""

    data: list[Dataset]
    has_more: bool = False
    next: str | None = None
