"""About how many tokens an uploaded dataset has, told from the characters of its first rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SAMPLE_BYTES = 1 << 20
# Of English, code and the large European languages, tokenizers of today make a token of some four characters; for
# other scripts fewer. What a template writes around a turn are about five tokens.
_CHARS_PER_TOKEN = 4.0
_TURN_TOKENS = 5
# The truth lies within these shares of it: 2.5 to 6 characters a token.
LOW, HIGH = 0.65, 1.6


@dataclass(frozen=True)
class Sample:
    """What rows come to: about how many there are in the whole file, and the mean and longest in tokens."""

    rows: int
    mean: float
    longest: int


def read_sample(head: bytes, total_bytes: int, max_length: int) -> Sample | None:
    """Return what the file that begins with `head` comes to; None where its rows cannot be told from its beginning.

    Args:
        total_bytes: the size of the whole file.
        max_length: tokens after which a row is cut.
    """
    whole = len(head) >= total_bytes
    # The last line may have been cut off.
    text = (head if whole else head[: head.rfind(b"\n") + 1]).decode("utf-8", "replace")
    rows = list(_json_lines(text) if text.lstrip()[:1] == "{" else _table(text))
    if not rows:
        return None
    share = 1.0 if whole else len(text.encode()) / total_bytes
    cut = [min(tokens, max_length) for tokens in rows]
    return Sample(round(len(rows) / share), sum(cut) / len(cut), round(max(rows)))


def _json_lines(text: str) -> Iterator[float]:
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield _tokens(row)


def _table(text: str) -> Iterator[float]:
    # A JSON array and Parquet's bytes have no rows that a part of them tells.
    if text.lstrip()[:1] == "[" or "\x00" in text:
        return
    try:
        yield from (_tokens(row) for row in csv.DictReader(io.StringIO(text)))
    except csv.Error:
        return


def _tokens(row: dict[str, Any]) -> float:
    turns = next((row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), None)
    if turns is None:
        texts = [value for value in row.values() if isinstance(value, str)]
        return sum(map(len, texts)) / _CHARS_PER_TOKEN + 2 * _TURN_TOKENS
    contents = [turn.get("content") or turn.get("value") or "" for turn in turns if isinstance(turn, dict)]
    characters = sum(len(content) for content in contents if isinstance(content, str))
    return characters / _CHARS_PER_TOKEN + len(contents) * _TURN_TOKENS
