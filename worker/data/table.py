"""CSV with a header line: rows of a table, read line by line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from common.errors import BadRows, InvalidInput
from worker.data.lines import bounded_lines, decode
from worker.data.source import FEWER_COLUMNS, RawRows, Source


def read_csv(source: Source, delimiter: str = ",") -> RawRows:
    """Yield the rows of a CSV file with a header line. Rows are counted without the header; values are strings."""
    # The csv module's limit is per field and global; a row is bounded by the lines, so the field may be as long as one.
    csv.field_size_limit(max(source.limits.max_row_bytes, 131072))
    with source.path.open("rb") as file:
        lines = _Lines(source, file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(source, rows)
        number = 0
        while True:
            number += 1
            lines.held = 0
            try:
                values = next(rows, None)
            except csv.Error as error:
                yield (
                    number,
                    source.bad_row(
                        number, "bad_csv", f"broken CSV in line {rows.line_num}: {error}", "check the quotes"
                    ),
                )
                continue
            if values is None:
                return
            if not values:
                number -= 1
                continue
            yield number, _csv_row(source, number, header, values)


class _Lines:
    # The lines of the file as text. `held` counts the bytes of the row that is being read: a quoted row goes over
    # any number of lines, and csv would gather all of them.

    def __init__(self, source: Source, file: BinaryIO):
        self._source = source
        self._lines = bounded_lines(source, file)
        self.held = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, offset, line = next(self._lines)
        if isinstance(line, BadRows):
            raise self._too_long(f"line {number} is longer")
        self.held += len(line)
        if self.held > self._source.limits.max_row_bytes:
            raise self._too_long(f"the row that ends in or after line {number} is longer")
        try:
            return decode(self._source, number, offset, line)
        except BadRows as error:
            message = error.message.partition(": ")[2].replace("row ", "line ", 1)
            raise self._source.bad_file(message, error.hint or "") from error

    def _too_long(self, what: str) -> InvalidInput:
        hint = "check the quotes; a quote that is not closed takes in all the lines that follow"
        return self._source.bad_file(f"{what} than {self._source.limits.max_row_bytes:,} bytes", hint)


def _header(source: Source, rows: Iterator[list[str]]) -> list[str]:
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise source.bad_file(f"the header line is broken CSV: {error}", "check the quotes") from error
    names = [name.strip() for name in header]
    if len(names) > source.limits.max_columns:
        raise source.bad_file(f"the header has {len(names)} {source.too_many_columns}", FEWER_COLUMNS)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise source.bad_file(f"the header names {', '.join(map(repr, twice))} twice", "name every column once")
    return names


def _csv_row(source: Source, number: int, header: list[str], values: list[str]) -> dict[str, Any] | BadRows:
    if len(values) != len(header):
        return source.bad_row(
            number,
            "bad_csv",
            f"has {len(values)} fields where the header has {len(header)}",
            "quote fields that hold commas",
        )
    return dict(zip(header, values, strict=True))
