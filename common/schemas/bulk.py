"""One wish for many jobs, as it is asked for and answered: shared by API, client and command."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, model_validator

from common.schemas.jobs import Metadata, ModelName
from common.schemas.values import Strict, Text

MOST = 1000
_Id = Annotated[Text, Field(min_length=1, max_length=40)]
_Moment = Annotated[AwareDatetime, Field(strict=False)]


def _once(value: list[str]) -> list[str]:
    return list(dict.fromkeys(value))


class JobFilter(Strict):
    """Jobs that have not ended and meet every condition: one of these states, these labels, this model, this age."""

    status: Annotated[list[Literal["validating", "queued", "running", "paused"]], Field(min_length=1, max_length=4)] = [
        "validating",
        "queued",
        "running",
        "paused",
    ]
    metadata: Metadata = {}
    model: ModelName | None = None
    created_after: _Moment | None = None
    created_before: _Moment | None = None

    @model_validator(mode="after")
    def _has_a_condition(self) -> JobFilter:
        conditions = (self.metadata, self.model, self.created_after, self.created_before)
        # An empty condition is met by every job, which nobody cancels by accident.
        if "status" not in self.model_fields_set and not any(conditions):
            raise ValueError("name at least one condition; every state in status means every job")
        return self


class CancelMany(Strict):
    """The body of `POST /jobs/cancel`: either `ids` or a `filter`. With `dry_run` nothing is done."""

    ids: Annotated[list[_Id], Field(min_length=1, max_length=MOST), AfterValidator(_once)] | None = None
    filter: JobFilter | None = None
    after: Annotated[str, Field(pattern=r"^\w{1,40}$")] | None = None
    limit: Annotated[int, Field(ge=1, le=MOST)] = MOST
    dry_run: bool = False

    @model_validator(mode="after")
    def _ids_or_filter(self) -> CancelMany:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("ids: give either ids or a filter")
        if self.ids is not None and self.after is not None:
            raise ValueError("after: goes with a filter")
        return self


class CancelOutcome(BaseModel):
    """What happened to one job, or would with `dry_run`; `status` is the job's now.

    `cancelling`: it runs, and its worker is told. `ended`: it had succeeded or failed.
    """

    id: str
    result: Literal["cancelled", "cancelling", "already_cancelled", "ended", "not_found"]
    status: str | None


class CancelList(BaseModel):
    """One line for each job; where more jobs match, `next` is the value of `after` for the next call."""

    data: list[CancelOutcome]
    dry_run: bool
    has_more: bool
    next: str | None
