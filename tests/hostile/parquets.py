"""Parquet files that are broken, or that hold far more than their size says."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.checking import Bad, Content

GOOD = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 8


def _table(columns: dict[str, Any], **options: Any) -> Callable[[Path], None]:
    # Built when it is written: what is small in the file may be large here.
    def write(path: Path) -> None:
        made = {name: column() if callable(column) else column for name, column in columns.items()}
        pq.write_table(pa.table(made), path, **options)

    return write


def _damaged(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(GOOD), path)
        path.write_bytes(damage(path.read_bytes()))

    return write


def _footer_size(num_bytes: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:-8] + struct.pack("<I", num_bytes) + data[-4:]


def _one_value(num_rows: int, num_chars: int) -> Callable[[], pa.Array]:
    return lambda: pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), ["x" * num_chars])


def _nested(levels: int) -> pa.Array:
    kind: pa.DataType = pa.string()
    value: Any = "x"
    for _ in range(levels):
        kind, value = pa.list_(kind), [value]
    return pa.array([value], kind)


def _wide_list(num_values: int, kind: pa.DataType) -> Callable[[], pa.Array]:
    def build() -> pa.Array:
        values = pa.nulls(num_values, kind)
        return pa.ListArray.from_arrays(pa.array([0, num_values], pa.int32()), values)

    return build


def _below(num_rows: int, num_chars: int) -> Callable[[], pa.Array]:
    # The same inside an object in a list, where it is less easily seen.
    def build() -> pa.Array:
        content = _one_value(num_rows, num_chars)()
        turns = pa.StructArray.from_arrays([pa.array(["user"] * num_rows), content], ["role", "content"])
        return pa.ListArray.from_arrays(pa.array(range(num_rows + 1), pa.int32()), turns)

    return build


def _mapped(num_chars: int) -> Callable[[], pa.Array]:
    kind = pa.map_(pa.string(), pa.string())
    return lambda: pa.array([[("content", "x" * num_chars)], [("content", "b")]], kind)


def parquet(name: str, content: Content, says: str, **limits: int) -> Bad:
    return Bad(name, "a.parquet", content, says, limits)


def _two_of_a_name(path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, path)


LONG = 5_000_000
PACKED = {"compression": "zstd", "use_dictionary": False}

BROKEN = [
    parquet("the first half", _damaged(lambda data: data[: len(data) // 2]), "not readable Parquet"),
    parquet("without its last byte", _damaged(lambda data: data[:-1]), "not readable Parquet"),
    parquet("head and tail alone", b"PAR1PAR1", "not readable Parquet"),
    parquet("a footer longer than the file", _damaged(_footer_size(2**31)), "not readable Parquet"),
    parquet("a footer without an end", _damaged(_footer_size(2**32 - 1)), "not readable Parquet"),
    parquet("a footer of nothing", _damaged(_footer_size(0)), "not readable Parquet"),
    parquet("a footer of zeros", b"PAR1" + b"\0" * 500 + struct.pack("<I", 400) + b"PAR1", "not readable Parquet"),
    parquet("an encrypted footer", b"PAR1" + b"\0" * 40 + struct.pack("<I", 30) + b"PARE", "not readable Parquet"),
    parquet("pages of noise", _damaged(lambda data: data[:4] + b"\xa5" * 200 + data[204:]), "not readable Parquet"),
    parquet("no rows", _table({"text": pa.array([], pa.string())}), "the file holds no rows"),
    parquet("no columns", _table({}), "the file holds no rows"),
    parquet("two columns of a name", _two_of_a_name, "two columns of the file have the same name"),
    parquet("unknown columns", _table({"foo": ["a"]}), "row 1: has the columns 'foo'"),
    parquet("bytes for text", _table({"text": [b"\xff\xfe"]}), "row 1: text is binary, not a string"),
    parquet("numbers for text", _table({"text": [1.5]}), "row 1: text is a number, not a string"),
    parquet("times for text", _table({"text": pa.array([0], pa.timestamp("s"))}), "row 1: text is a datetime"),
    parquet("a time beyond the calendar", _table({"text": pa.array([0, 2**60], pa.timestamp("us"))}), "row 2: holds a"),
    parquet("nulls for text", _table({"text": pa.array([None], pa.string())}), "row 1: text is null"),
    parquet("a role of null", _table({"messages": [[{"role": None, "content": "a"}]]}), "row 1: messages[0] role None"),
    parquet("objects for messages", _table({"messages": _mapped(1)}), "row 1: messages[0] is a tuple"),
    parquet(
        "invalid UTF-8", _table({"text": pa.array([b"ok", b"\xff"]).cast(pa.string(), safe=False)}), "row 2: holds a"
    ),
    parquet("a NUL", _table({"text": ["a\0b"]}), "row 1: text holds a NUL"),
]

BOMBS = [
    parquet("one value a million times", _table({"text": _one_value(10**6, 50_000)}), "more than 4,000,000 bytes",
            max_bytes=4_000_000),
    parquet("one long value many times", _table({"text": _one_value(900, LONG)}), "row 1: is longer"),
    parquet("one long value in a list", _table({"messages": _below(900, LONG)}), "row 1: is longer"),
    parquet("one long value in a map", _table({"messages": _mapped(LONG)}), "row 1: is longer"),
    parquet("one value for all rows at once", _table({"messages": _below(64, 25_000_000)}), "row 1: is longer"),
    parquet("a page of 60 MB", _table({"text": lambda: pa.array(["x" * 60_000_000])}, **PACKED), "row 1: is longer"),
    parquet("a view of 5 MB", _table({"text": lambda: pa.array(["x" * LONG], pa.string_view())}), "row 1: is longer"),
    parquet("1,000 columns", _table({f"c{n}": ["a"] for n in range(1000)}), "1000 columns, more than 256"),
    parquet("300 fields in a column", _table({"messages": [{f"f{n}": 1 for n in range(300)}]}), "300 columns, more"),
    parquet("lists in lists", _table({"text": _nested(40)}), "row 1: is nested deeper than 32 levels"),
    parquet("lists in lists without end", _table({"text": _nested(900)}), "too deeply nested"),
    parquet("five million nulls in a row", _table({"text": _wide_list(5 * 10**6, pa.string())}), "row 1: is longer"),
    parquet("50 million bits in a row", _table({"text": _wide_list(5 * 10**7, pa.bool_())}), "row 1: is longer"),
    parquet("a name of a megabyte", _table({"c" * 10**6: ["a"]}), "row 1: has the columns 'ccc"),
]  # fmt: skip

ALL = [*BROKEN, *BOMBS]
