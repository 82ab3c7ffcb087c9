"""Identifiers: a readable prefix and 26 Crockford base-32 characters (a ULID), so that ids sort by age."""

from __future__ import annotations

import os
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str) -> str:
    """Return `prefix_` and a ULID in lower case: 48 bits of milliseconds, then 80 random bits.

    Source of the layout: the ULID specification. Ids made in the same millisecond have no order among themselves.
    """
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    characters = [_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5)]
    return f"{prefix}_{''.join(characters)}"
