"""What a job leaves behind besides its reports. Each word is also the name of a folder among its artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from common.schemas.values import Priority, Strict

Merged = Literal["merged", "merged_dequantized", "merged_4bit"]
Export = Literal["adapter", "model", "merged", "merged_dequantized", "merged_4bit"]

# Only 4-bit training has a base to dequantise, and only adapters can be merged.
_MAKES: dict[str, tuple[Export, ...]] = {
    "qlora": ("adapter", "merged", "merged_dequantized", "merged_4bit"),
    "lora": ("adapter", "merged", "merged_4bit"),
    "full": ("model",),
}


def _once_each(values: list[str]) -> list[str]:
    if len(set(values)) != len(values):
        raise ValueError("names something twice")
    return values


Exports = Annotated[list[Export], Field(min_length=1, max_length=4), AfterValidator(_once_each)]


def check_exports(exports: Sequence[Export], method: str) -> None:
    """Raise ValueError unless a job of `method` makes everything in `exports`."""
    for form in exports:
        if form not in _MAKES[method]:
            raise ValueError(f'export: method "{method}" makes no "{form}"; it makes {", ".join(_MAKES[method])}')


class ExportRequest(Strict):
    """The body of `POST /jobs/{id}/export`: which merged models to make of a finished job's adapter."""

    export: Annotated[list[Merged], Field(min_length=1, max_length=3), AfterValidator(_once_each)] = ["merged"]
    priority: Priority = 0
