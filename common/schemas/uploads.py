"""Uploads whose parts go straight to the object store: shared by API, client and command."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from common.schemas.datasets import Dataset
from common.schemas.values import Strict, Text

PARTS_PER_PAGE = 100


class UploadBegin(Strict):
    """The body of `POST /uploads`: a file before its first byte. `bytes` and `sha256` are those of the whole."""

    name: Annotated[Text, Field(min_length=1, max_length=512)]
    bytes: Annotated[int, Field(ge=1, le=2**53)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]


class UploadPart(BaseModel):
    """A part of a file: its number from 1, and which bytes it has."""

    number: int
    offset: int
    bytes: int


class Upload(BaseModel):
    """An upload; `parts` have arrived, `dataset` is what it became.

    It is cut into parts of `part_bytes`, of which the last one is what is left. `failed`: the parts are not the
    content that was announced.
    """

    id: str
    status: Literal["pending", "completed", "cancelled", "expired", "failed"]
    name: str
    bytes: int
    sha256: str
    part_bytes: int
    num_parts: int
    parts: list[UploadPart]
    dataset: Dataset | None
    created_at: datetime
    expires_at: datetime


class PartLink(UploadPart):
    """A part that has not arrived, and the signed link that takes exactly its bytes by PUT."""

    url: str


class PartLinkList(BaseModel):
    """One page of the parts that have not arrived, by number; `next` is the value of `after` for the next page."""

    data: list[PartLink]
    has_more: bool = False
    next: int | None = None
