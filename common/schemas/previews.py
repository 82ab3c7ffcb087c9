"""Rows of a dataset as a model will see them: shared by API, worker, client and command."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from common.schemas.jobs import ChatTemplate
from common.schemas.values import Strict

ROWS_MAX = 20
# Of all rows together: more is no preview.
TOKENS_MAX = 16_384

Loss = Literal["auto", "all", "completion", "assistant"]


class PreviewOptions(Strict):
    """How rows are to be shown: `offset` rows that can be read are passed over, the rest is as in a job."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    rows: Annotated[int, Field(ge=1, le=ROWS_MAX)] = 5
    offset: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    loss: Loss = "auto"
    chat_template: ChatTemplate | None = None


class PreviewAsked(PreviewOptions):
    """What a preview is asked of."""

    dataset: str


class PreviewToken(BaseModel):
    """One token: its id, what it adds to the text, and whether it carries loss."""

    id: int
    text: str
    trained: bool


class PreviewedRow(BaseModel):
    """One row of the file, by its number. `num_cut` tokens lie beyond `max_length`; `tokens` may be fewer still."""

    row: int
    loss: str
    num_tokens: int
    num_trained: int
    num_cut: int
    tokens: list[PreviewToken]


class Preview(BaseModel):
    """Rows as the model will see them. While `status` is waiting, a preflight worker has not answered yet."""

    status: Literal["ready", "waiting"]
    dataset: str
    model: str
    base_revision: str | None = None
    max_length: int | None = None
    loss: str
    offset: int
    template: Literal["base", "plain", "request"] | None = None
    rows: list[PreviewedRow] = []
    problems: list[str] = []
    has_more: bool = False
