"""What the objects of OpenAI's API have in common: times in whole seconds, lists with cursors, ids in paths."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, Field

from common.errors import InvalidInput
from common.schemas.values import Strict

After = Annotated[str | None, Query(pattern=r"^[\w-]{1,64}$", description="The id of the last page's last object.")]


class ExpiresAfter(Strict):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class Page(BaseModel):
    """A page of a list. The next one begins after `last_id`."""

    object: Literal["list"] = "list"
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(BaseModel):
    """What was removed."""

    id: str
    object: str
    deleted: bool = True


def ends(ids: list[str]) -> dict[str, str | None]:
    """Return the fields of a page that name its first and its last object."""
    return {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


def check_purpose(purpose: str) -> None:
    """Raise unless a file is for fine-tuning.

    Raises:
        InvalidInput: it is for something else.
    """
    if purpose != "fine-tune":
        raise InvalidInput(
            f"purpose: this server keeps files to fine-tune with, not for {purpose[:32]!r}",
            param="purpose",
            code="purpose_unknown",
            hint='Use "fine-tune".',
        )
