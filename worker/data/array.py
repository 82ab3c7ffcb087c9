"""A JSON file that is one array of objects, read element by element: the file may be larger than the memory."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, BinaryIO

from common.errors import BadRows
from worker.data import strict_json
from worker.data.lines import check_object
from worker.data.source import FLATTER, RawRows, Source

_CHUNK = 1 << 16
_CHECK = "check the commas, quotes and values of this row"
_BLANK = re.compile(r"[ \t\r\n]*")


class _Window:
    # The part of the file that is in memory: text from `start` on is still to be parsed.

    def __init__(self, source: Source, file: BinaryIO):
        self._source = source
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.num_read = 0
        self.text = ""
        self.start = 0
        self.row = 0
        self.ended = False

    def grow(self, characters: int) -> None:
        """Hold at least `characters` beyond `start`, if the file has them."""
        pieces, have = [self.text[self.start :]], len(self.text) - self.start
        while have < characters and not self.ended:
            data = self._file.read(_CHUNK)
            self.ended = not data
            pieces.append(self._decode(data))
            self.num_read += len(data)
            self._source.count_bytes(self.num_read)
            have += len(pieces[-1])
        self.text, self.start = "".join(pieces), 0

    def _decode(self, data: bytes) -> str:
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            held = len(self._decoder.getstate()[0])
            where = f"byte {max(0, self.num_read - held) + error.start:,} of the file, in or after row {self.row + 1}"
            raise self._source.bad_file(f"the file is not UTF-8 at {where}", "save it as UTF-8") from error
        if "\x00" in text:
            raise self._source.bad_file(f"the file holds a NUL byte, in or after row {self.row + 1}", "remove it")
        return text

    def next_char(self) -> str:
        """Return the next character that is not blank, without taking it; empty at the end of the file."""
        while True:
            self.start = _BLANK.match(self.text, self.start).end()  # type: ignore[union-attr]
            if self.start < len(self.text) or self.ended:
                return self.text[self.start : self.start + 1]
            self.grow(_CHUNK)


def read_array(source: Source) -> RawRows:
    """Yield the elements of the array; row numbers count them from 1.

    Raises:
        BadRows: the array is broken. What follows a broken element cannot be told apart, so reading stops there.
    """
    with source.path.open("rb") as file:
        window = _Window(source, file)
        if window.next_char() != "[":
            raise source.bad_file(
                "the file is not a JSON array", "write [ {…}, {…} ], or one object per line as .jsonl"
            )
        window.start += 1
        if window.next_char() == "]":
            window.start += 1
            return _no_more(source, window)
        while True:
            window.row += 1
            source.count_rows(window.row)
            source.at(window.row, window.num_read)
            value = _element(source, window)
            try:
                yield window.row, check_object(source, window.row, value)
            except BadRows as error:
                yield window.row, error
            separator = window.next_char()
            window.start += 1
            if separator == "]":
                return _no_more(source, window)
            if separator != ",":
                raise source.bad_row(
                    window.row + 1, "bad_json", "broken JSON: expected , or ] after the row before it", _CHECK
                )


def _no_more(source: Source, window: _Window) -> None:
    if window.next_char():
        raise source.bad_file("the file goes on after the end of its JSON array", "keep one array per file")


def _element(source: Source, window: _Window) -> Any:
    # An object at the edge of the window looks broken until more of it is there: widen, up to the longest row.
    limit, wanted = source.limits.max_row_bytes, _CHUNK
    if window.next_char() not in ("{", "["):
        raise source.bad_row(
            window.row, "not_an_object", "is not an object", 'write each row as an object, e.g. {"messages": […]}'
        )
    while True:
        if len(window.text) - window.start < wanted and not window.ended:
            window.grow(wanted)
        try:
            value, end = strict_json.DECODER.raw_decode(window.text, window.start)
        except strict_json.BadJson as error:
            raise source.bad_row(window.row, "bad_json", str(error), _CHECK) from error
        except RecursionError as error:
            raise source.bad_row(window.row, "too_deep", "the nesting is too deep", FLATTER) from error
        except ValueError as error:
            if window.ended or not _cut_short(window, error) or len(window.text) - window.start > limit:
                raise _broken(source, window, error) from error
            wanted *= 2
            continue
        if end - window.start > limit:
            raise source.long_row(window.row)
        window.start = end
        return value


def _cut_short(window: _Window, error: ValueError) -> bool:
    # Whether the text may only look broken because it ends in the middle of the element.
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - 8


def _broken(source: Source, window: _Window, error: ValueError) -> BadRows:
    if not window.ended and _cut_short(window, error):
        return source.long_row(window.row)
    what = f"broken JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else "a number has too many digits"
    return source.bad_row(window.row, "bad_json", what, _CHECK)
