"""What every schema of a job is made of: strict objects, and text that can be stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Auto = Literal["auto"]


def no_nul(value: str) -> str:
    """Return `value`, or raise ValueError where a database would refuse it."""
    if "\x00" in value or any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ValueError("contains a NUL or a lone surrogate, which no database stores")
    return value


Text = Annotated[str, AfterValidator(no_nul)]

Priority = Annotated[int, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """An object that refuses unknown keys and values of another type."""

    # A float that is not finite would be stored as JSON that no other parser reads.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
