"""CSV and Parquet: rows of a table, a few at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import InvalidInput
from worker.data import strict_json
from worker.data.lines import bounded_lines, decode
from worker.data.source import RawRows, Source

# Rows decoded at once: few, because a small Parquet file can expand a thousandfold.
_BATCH_ROWS = 64


def read_csv(source: Source, delimiter: str = ",") -> RawRows:
    """Yield the rows of a CSV file with a header line. Rows are counted without the header; values are strings."""
    # The csv module's limit is per field and global; a row is bounded by the lines, so the field may be as long as one.
    csv.field_size_limit(max(source.limits.max_row_bytes, 131072))
    with source.path.open("rb") as file:
        rows = csv.reader(_text_lines(source, bounded_lines(source, file)), delimiter=delimiter, strict=True)
        header = _header(source, rows)
        number = 0
        while True:
            number += 1
            try:
                values = next(rows, None)
            except csv.Error as error:
                yield number, source.bad_row(number, f"broken CSV in line {rows.line_num}: {error}", "check the quotes")
                continue
            if values is None:
                return
            if not values:
                number -= 1
                continue
            yield number, _csv_row(source, number, header, values)


def _text_lines(source: Source, lines: Iterator[tuple[int, int, bytes | InvalidInput]]) -> Iterator[str]:
    for number, offset, line in lines:
        if isinstance(line, InvalidInput):
            raise source.bad_file(f"line {number} is longer than {source.limits.max_row_bytes:,} bytes")
        try:
            yield decode(source, number, offset, line)
        except InvalidInput as error:
            message = error.message.partition(": ")[2].replace("row ", "line ", 1)
            raise source.bad_file(message, error.hint) from error


def _header(source: Source, rows: Iterator[list[str]]) -> list[str]:
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise source.bad_file(f"the header line is broken CSV: {error}", "check the quotes") from error
    names = [name.strip() for name in header]
    if len(names) > source.limits.max_columns:
        raise source.bad_file(f"the header has {len(names)} columns, more than {source.limits.max_columns}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise source.bad_file(f"the header names {', '.join(map(repr, twice))} twice", "name every column once")
    return names


def _csv_row(source: Source, number: int, header: list[str], values: list[str]) -> dict[str, Any] | InvalidInput:
    if sum(map(len, values)) > source.limits.max_row_bytes:
        return source.long_row(number)
    if len(values) != len(header):
        return source.bad_row(
            number, f"has {len(values)} fields where the header has {len(header)}", "quote fields that hold commas"
        )
    return dict(zip(header, values, strict=True))


def read_parquet(source: Source) -> RawRows:
    """Yield the rows of a Parquet file, batch by batch; the decoded size is bounded, whatever the file claims."""
    try:
        with pq.ParquetFile(source.path) as file:
            _check_schema(source, file)
            yield from _batches(source, file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise source.bad_file(f"the file is not readable Parquet: {error}", "write it again, uncut") from error


def _check_schema(source: Source, file: pq.ParquetFile) -> None:
    source.count_rows(file.metadata.num_rows)
    groups = range(file.metadata.num_row_groups)
    source.count_bytes(sum(file.metadata.row_group(index).total_byte_size for index in groups))
    names = file.schema_arrow.names
    if file.metadata.num_columns > source.limits.max_columns:
        raise source.bad_file(
            f"the file has {file.metadata.num_columns} columns, more than {source.limits.max_columns}"
        )
    if len(set(names)) != len(names):
        raise source.bad_file("two columns of the file have the same name", "name every column once")


def _batches(source: Source, file: pq.ParquetFile) -> RawRows:
    number = decoded = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS):
        if batch.nbytes > source.limits.max_row_bytes * batch.num_rows:
            raise source.long_row(number + 1)
        for row in _unfolded(batch):
            number += 1
            source.count_rows(number)
            size = strict_json.weigh(row)
            decoded += size
            source.count_bytes(decoded)
            if size > source.limits.max_row_bytes:
                yield number, source.long_row(number)
            elif strict_json.depth(row, source.limits.max_depth) > source.limits.max_depth:
                yield number, source.bad_row(number, f"is nested deeper than {source.limits.max_depth} levels")
            else:
                yield number, row


def _unfolded(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    # Rows that share one long value of a dictionary are unfolded one at a time.
    if any(pa.types.is_dictionary(column) for column in batch.schema.types):
        for index in range(batch.num_rows):
            yield from batch.slice(index, 1).to_pylist()
    else:
        yield from batch.to_pylist()
