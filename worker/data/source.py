"""A dataset file and what to call it in errors, with the two kinds of trouble: one row's, and the whole file's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import BadRows, InvalidInput, JobProblem, TooLarge
from worker.data.limits import Limits

# Problems that are kept, and those of them that are written out in the message.
KEPT = 100
WRITTEN = 20
# A message is for people: what a file brings into it (a role, a name, a key) may be megabytes.
_MESSAGE_CHARS = 600
_STRETCH = 64

# What a file's name may end with to say its format: whoever fetches it has to keep that.
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
FEWER_COLUMNS = "keep the columns that are trained on"
FLATTER = "write it flatter: a row needs messages, and messages need role and content"

# A row is its number (counted from 1) and its columns, or what is wrong with it.
RawRows = Iterator[tuple[int, "dict[str, Any] | BadRows"]]
# Hears how far a file is read: to which row and which byte.
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Share:
    """The rows of a file that one of several processes reads: every so many-th stretch of them."""

    index: int = 0
    of: int = 1

    def has(self, number: int) -> bool:
        """Return whether the row `number` is one of them."""
        return self.of == 1 or number // _STRETCH % self.of == self.index


@dataclass(frozen=True)
class Source:
    """One dataset file; `param` is the field of the job that named it, `share` the rows that are read of it.

    `watch` is called at each row, so it has to be quick.
    """

    path: Path
    limits: Limits = field(default_factory=Limits)
    param: str = "dataset"
    share: Share = Share()
    watch: Watch | None = None

    @property
    def whole(self) -> Source:
        """The same file with all its rows, for a look at them that nobody watches."""
        return replace(self, share=Share(), watch=None)

    def bad_row(self, number: int, code: str, message: str, hint: str, where: str | None = None) -> BadRows:
        """Return the error that row `number` is wrong (in the column or turn `where`), and what to do about it."""
        problem = JobProblem(self.param, number, where, code, _shown(message), hint)
        return BadRows(problem.line, (problem,), 1, code="bad_row")

    def bad_file(self, message: str, hint: str) -> InvalidInput:
        """Return the error that the file as a whole cannot be read, and what to do about it."""
        return InvalidInput(f"{self.param}: {_shown(message)}", code="bad_dataset", param=self.param, hint=hint)

    @property
    def too_many_columns(self) -> str:
        """The end of a sentence about a row or file that has too many columns."""
        return f"columns, more than {self.limits.max_columns}"

    @property
    def too_deep(self) -> str:
        """What is wrong with a row of too many levels."""
        return f"is nested deeper than {self.limits.max_depth} levels"

    def too_large(self, message: str, hint: str) -> TooLarge:
        """Return the error that the file passes a limit of the operator."""
        return TooLarge(f"{self.param}: {message}", param=self.param, hint=hint)

    def at(self, row: int, byte: int) -> None:
        """Say how far the file is read."""
        if self.watch is not None:
            self.watch(row, byte)

    def count_bytes(self, total: int) -> None:
        """Raise when more than the allowed bytes were decoded."""
        if total > self.limits.max_bytes:
            raise self.too_large(
                f"it holds more than {self.limits.max_bytes:,} bytes when decoded",
                "split it, or ask the operator to raise TUNERY_MAX_DATASET_BYTES",
            )

    def count_rows(self, number: int) -> None:
        """Raise when more than the allowed rows were read."""
        if number > self.limits.max_rows:
            raise self.too_large(
                f"it has more than {self.limits.max_rows:,} rows",
                "split it, or ask the operator to raise TUNERY_MAX_ROWS",
            )

    def long_row(self, number: int) -> BadRows:
        """Return the error that row `number` is longer than allowed."""
        return self.bad_row(
            number,
            "too_long",
            f"is longer than {self.limits.max_row_bytes:,} bytes",
            "shorten it, or ask the operator to raise TUNERY_MAX_ROW_BYTES; a JSONL file has one object per line",
        )


def _shown(message: str) -> str:
    # What a database cannot store (NULs, lone surrogates) is spelled out.
    message = message.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
    half = _MESSAGE_CHARS // 2
    return message if len(message) <= _MESSAGE_CHARS else f"{message[:half]} … {message[-half:]}"


class Problems:
    """Collects what is wrong with the rows of a file: the first many in full, the rest as a number."""

    def __init__(self, kept: int = KEPT):
        self._kept = kept
        self._noted: list[JobProblem] = []
        self.count = 0

    @property
    def lines(self) -> list[str]:
        """The first few as text, in the order of their rows."""
        return [problem.line for problem in self._noted[:WRITTEN]]

    def add(self, error: BadRows) -> None:
        """Note what is wrong with further rows."""
        self.count += error.num_problems
        self._noted += error.problems[: self._kept - len(self._noted)]

    def merge(self, other: Problems) -> None:
        """Take in what was found in other rows of the same file."""
        self.count += other.count
        self._noted = sorted([*self._noted, *other._noted], key=lambda noted: noted.row)[: self._kept]

    def raise_any(self) -> None:
        """Raise one error that lists all that was noted, if anything was."""
        if not self._noted:
            return
        lines = self.lines
        if self.count > len(lines):
            lines.append(f"… and {self.count - len(lines):,} more bad rows")
        raise BadRows("\n".join(lines), self._noted, self.count, code="bad_row" if self.count == 1 else "bad_rows")
