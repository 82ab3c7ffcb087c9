"""Identifiers: a readable prefix and 26 Crockford base-32 characters (a ULID), so that ids sort by age."""

from __future__ import annotations

import os
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_CHARACTERS = 10


def new_id(prefix: str) -> str:
    """Return `prefix_` and a ULID in lower case: 48 bits of milliseconds, then 80 random bits.

    Source of the layout: the ULID specification. Ids made in the same millisecond have no order among themselves.
    """
    return _written(prefix, (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10)))


def before_all(prefix: str, seconds: float) -> str:
    """Return what sorts before every id that is made at that moment (seconds since the epoch) or later."""
    value = max(0, int(seconds * 1000)) << 80
    return _written(prefix, value)[: len(prefix) + 1 + _TIME_CHARACTERS]


def _written(prefix: str, value: int) -> str:
    characters = [_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5)]
    return f"{prefix}_{''.join(characters)}"
