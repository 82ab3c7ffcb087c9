"""JSON Lines: one object per line, read with a bounded buffer; a bad line does not hide the ones after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from common.errors import BadRows
from worker.data import strict_json
from worker.data.source import FEWER_COLUMNS, FLATTER, RawRows, Source

BOM = b"\xef\xbb\xbf"


def read_jsonl(source: Source) -> RawRows:
    """Yield the rows of a JSON Lines file. The number of a row is that of its line; blank lines are passed over."""
    with source.path.open("rb") as file:
        for number, offset, line in bounded_lines(source, file):
            if not source.share.has(number):
                continue
            if isinstance(line, BadRows):
                yield number, line
            elif line.strip():
                try:
                    yield number, parse_object(source, number, decode(source, number, offset, line))
                except BadRows as error:
                    yield number, error


def bounded_lines(source: Source, file: BinaryIO) -> Iterator[tuple[int, int, bytes | BadRows]]:
    """Yield (line number, byte offset, line with its end), or an error in place of a line that is too long."""
    limit = source.limits.max_row_bytes + 1  # the newline
    number = offset = 0
    while line := file.readline(limit + 1):
        number += 1
        source.count_rows(number)
        start, offset = offset, offset + len(line)
        too_long = len(line) > limit
        while too_long and not line.endswith(b"\n") and (line := file.readline(limit)):
            offset += len(line)
            source.count_bytes(offset)
        source.count_bytes(offset)
        source.at(number, offset)
        if too_long:
            yield number, start, source.long_row(number)
        else:
            yield number, start, line.removeprefix(BOM) if number == 1 else line


def decode(source: Source, number: int, offset: int, line: bytes) -> str:
    """Return `line` as text.

    Raises:
        BadRows: it is not UTF-8, or holds a NUL byte; the message names row and byte.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {offset + error.start:,} of the file (0x{line[error.start]:02x})"
        raise source.bad_row(number, "not_utf8", f"is not UTF-8 at {where}", "save the file as UTF-8") from error
    if "\x00" in text:
        position = offset + line.index(b"\x00")
        raise source.bad_row(number, "nul", f"holds a NUL byte at byte {position:,} of the file", "remove it")
    return text


def parse_object(source: Source, number: int, text: str) -> dict[str, Any]:
    """Return the JSON object in `text`, checked for depth and number of keys."""
    try:
        value = strict_json.loads(text.strip())
    except strict_json.BadJson as error:
        raise source.bad_row(number, "bad_json", str(error), "each line must hold one complete JSON object") from error
    return check_object(source, number, value)


def check_object(source: Source, number: int, value: Any) -> dict[str, Any]:
    """Return `value` if it is an object within the limits of columns and depth."""
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a bare value")
        raise source.bad_row(
            number, "not_an_object", f"is {kind}, not an object", 'write each row as an object, e.g. {"messages": […]}'
        )
    if len(value) > source.limits.max_columns:
        raise source.bad_row(number, "too_many_columns", f"has {len(value)} {source.too_many_columns}", FEWER_COLUMNS)
    if strict_json.depth(value, source.limits.max_depth) > source.limits.max_depth:
        raise source.bad_row(number, "too_deep", source.too_deep, FLATTER)
    return value
