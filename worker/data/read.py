"""Rows of a dataset file, whatever its format: told apart by its first bytes, then by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from worker.data.array import read_array
from worker.data.lines import BOM, read_jsonl
from worker.data.parquet import read_parquet
from worker.data.source import RawRows, Source
from worker.data.table import read_csv

# What Excel writes, too.
_ZIP = "a zip archive or a spreadsheet"
_PACKED = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": _ZIP,
    b"PK\x05\x06": _ZIP,
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
READERS: dict[str, Callable[[Source], RawRows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
}
# Bytes of a file of no known format that are told.
_SHOWN = 20
ACCEPTED = "JSONL, JSON (an array of objects), CSV or Parquet"


def read_rows(source: Source) -> RawRows:
    """Yield (row number, columns) for each row of the file; a BadRows in place of a row that is broken.

    Raises:
        InvalidInput: the file as a whole cannot be read, or holds no row.
        TooLarge: it passes a limit.
    """
    empty = True
    for item in _reader(source)(source):
        empty = False
        if source.share.has(item[0]):
            yield item
    if empty and source.share.of == 1:
        raise source.bad_file("the file holds no rows", "add at least one row")


def _reader(source: Source) -> Callable[[Source], RawRows]:
    with source.path.open("rb") as file:
        head = file.read(4096)
    if not head:
        raise source.bad_file("the file is empty", "upload a file that has at least one row")
    for magic, what in _PACKED.items():
        if head.startswith(magic):
            sheet = "; save a spreadsheet as CSV" if what == _ZIP else ""
            raise source.bad_file(f"the file is {what}", f"unpack it{sheet}; accepted are {ACCEPTED}")
    if head.startswith(b"PAR1"):
        return read_parquet
    if head.startswith(_UTF16):
        raise source.bad_file("the file is not UTF-8 at byte 0: it looks like UTF-16", "save it as UTF-8")
    return _text_reader(source, head.removeprefix(BOM).lstrip())


def _text_reader(source: Source, head: bytes) -> Callable[[Source], RawRows]:
    suffix = source.path.suffix.lower()
    if suffix == ".parquet":
        raise source.bad_file("the file is named .parquet but is not Parquet", f"accepted are {ACCEPTED}")
    tabular = suffix in (".csv", ".tsv")
    if head.startswith(b"[") and not tabular:
        return read_array
    if suffix in READERS:
        return READERS[suffix]
    if head.startswith(b"{"):
        return read_jsonl
    if b"," in head.split(b"\n", 1)[0]:
        return read_csv
    # Not the name: what was fetched lies under one of the worker's own.
    raise source.bad_file(
        f"the format of the file is not known; it begins with {head[:_SHOWN].decode(errors='replace')!r}",
        f"accepted are {ACCEPTED}, with the file ending that says so",
    )
