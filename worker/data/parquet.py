"""Parquet: rows a few at a time. A few kilobytes can stand for gigabytes, so values are weighed before they unfold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from worker.data import strict_json
from worker.data.source import FEWER_COLUMNS, FLATTER, RawRows, Source

_BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20
_REWRITE = "write it again, uncut"
_TYPES = pa.types
_TEXTS = (
    _TYPES.is_string,
    _TYPES.is_large_string,
    _TYPES.is_string_view,
    _TYPES.is_binary,
    _TYPES.is_large_binary,
    _TYPES.is_binary_view,
    _TYPES.is_fixed_size_binary,
)


def read_parquet(source: Source) -> RawRows:
    """Yield the rows of a Parquet file, batch by batch; the decoded size is bounded, whatever the file claims."""
    try:
        # Without a buffer the library holds whole column chunks.
        with pq.ParquetFile(source.path, buffer_size=_BUFFER_BYTES) as file:
            _check_schema(source, file)
            yield from _rows(source, file)
    except MemoryError as error:
        raise source.bad_file(
            "a page of the file needs more memory than a check may use", "write it with shorter rows and smaller pages"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise source.bad_file(f"the file is not readable Parquet: {' '.join(str(error).split())}", _REWRITE) from error


def _check_schema(source: Source, file: pq.ParquetFile) -> None:
    source.count_rows(file.metadata.num_rows)
    groups = range(file.metadata.num_row_groups)
    source.count_bytes(sum(file.metadata.row_group(index).total_byte_size for index in groups))
    if file.metadata.num_columns > source.limits.max_columns:
        raise source.bad_file(f"the file has {file.metadata.num_columns} {source.too_many_columns}", FEWER_COLUMNS)
    names = file.schema_arrow.names
    if len(set(names)) != len(names):
        raise source.bad_file("two columns of the file have the same name", "name every column once")


def _rows(source: Source, file: pq.ParquetFile) -> RawRows:
    number = decoded = 0
    # Columns lie one after the other: how many bytes a row is into the file can only be said in proportion.
    row_bytes = source.path.stat().st_size / max(1, file.metadata.num_rows)
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
        for row, weight in _unfolded(source, batch):
            number += 1
            decoded += weight
            source.count_rows(number)
            source.count_bytes(decoded)
            source.at(number, int(number * row_bytes))
            if weight > source.limits.max_row_bytes:
                yield number, source.long_row(number)
            elif isinstance(row, str):
                yield (
                    number,
                    source.bad_row(
                        number, "unreadable", f"holds a value that cannot be read: {row}", "write it as text"
                    ),
                )
            elif strict_json.depth(row, source.limits.max_depth) > source.limits.max_depth:
                yield number, source.bad_row(number, "too_deep", source.too_deep, FLATTER)
            else:
                yield number, row


def _unfolded(source: Source, batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | str, int]]:
    # (row, or what is wrong with it, and its weight). Rows that are heavy together are unfolded one at a time.
    weight = weigh(batch)
    if weight <= source.limits.max_row_bytes:
        # A text that is not UTF-8, or a time that Python's calendar does not have: the row is found below.
        with suppress(ValueError, OverflowError):
            yield from ((row, weight // batch.num_rows) for row in batch.to_pylist())
            return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        weight = weigh(row)
        try:
            yield ({} if weight > source.limits.max_row_bytes else row.to_pylist()[0]), weight
        except (ValueError, OverflowError) as error:
            yield str(error), weight


def weigh(batch: pa.RecordBatch) -> int:
    """Return roughly the bytes of `batch` as Python values: those of its texts, and eight for everything else."""
    return sum(_weigh(column) for column in batch.columns)


def _weigh(values: pa.Array) -> int:
    kind = values.type
    if _TYPES.is_dictionary(kind):
        # One value of the dictionary, named a million times, becomes a million values.
        texts = values.dictionary
        return _sum(_lengths(texts).take(values.indices)) if _is_text(texts.type) else 8 * len(values)
    if _is_text(kind):
        return len(values) + _sum(_lengths(values))
    inner: list[pa.Array] = []
    if _TYPES.is_map(kind):
        start, end = values.offsets[0].as_py(), values.offsets[-1].as_py()
        inner = [values.keys.slice(start, end - start), values.items.slice(start, end - start)]
    elif _TYPES.is_struct(kind):
        inner = values.flatten()
    elif _TYPES.is_nested(kind):
        inner = [values.flatten()]
    return 8 * len(values) + sum(_weigh(item) for item in inner)


def _is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in _TEXTS)


def _lengths(texts: pa.Array) -> pa.Array:
    is_view = _TYPES.is_string_view(texts.type) or _TYPES.is_binary_view(texts.type)
    return pc.binary_length(texts.cast(pa.large_binary()) if is_view else texts)


def _sum(lengths: pa.Array) -> int:
    return int(pc.sum(lengths).as_py() or 0)
