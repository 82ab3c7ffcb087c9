"""JSON as datasets need it: duplicate keys, NaN and deep nesting are errors, with the reason in words."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

SURROGATE = re.compile("[\ud800-\udfff]")


class BadJson(ValueError):
    """Why a piece of text is not JSON that we accept; the message is for the user."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadJson(f"the key {twice!r} appears twice in one object")
    return values


def _no_constant(word: str) -> NoReturn:
    raise BadJson(f"{word} is not JSON; use null or a number")


DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def loads(text: str) -> Any:
    """Return the value of `text`.

    Raises:
        BadJson: it is not JSON, or has duplicate keys, NaN, or nesting deeper than the parser's stack.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadJson(describe(error)) from error
    except RecursionError as error:
        raise BadJson("the nesting is too deep") from error
    except BadJson:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise BadJson("a number has too many digits") from error


def describe(error: json.JSONDecodeError) -> str:
    """Return what is wrong and where, with the character counted from 1."""
    return f"broken JSON: {error.msg} at character {error.colno}"


def depth(value: Any, limit: int) -> int:
    """Return the levels of nesting in `value`, stopping at `limit` + 1. A flat object has depth 1."""
    level, front = 0, [value]
    while front and level <= limit:
        front = [child for item in front if isinstance(item, (dict, list)) for child in _children(item)]
        level += bool(front)
    return level


def _children(item: dict[str, Any] | list[Any]) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item
