"""How much of a dataset is read before it is refused: every reader takes these, so that no file can fill the memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one dataset file. `max_bytes` counts decoded bytes, `max_depth` levels of nesting in a row."""

    max_bytes: int = 8 * 2**30
    max_row_bytes: int = 4 * 2**20
    max_rows: int = 10_000_000
    max_columns: int = 256
    max_depth: int = 32
