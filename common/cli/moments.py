"""Moments as people type them: `2026-12-24T02:00` in local time, `+90m` from now, `-7d` before it."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from common.errors import InvalidInput

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def parse_moment(text: str, option: str) -> datetime:
    """Return the moment that `text` means, with its zone.

    Raises:
        InvalidInput: it means none.
    """
    relative = re.fullmatch(r"([+-]\d{1,6})([mhd])", text)
    if relative:
        return datetime.now().astimezone() + timedelta(**{_UNITS[relative[2]]: int(relative[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            f"{option} {text}: is no moment",
            param=option,
            hint="for example 2026-12-24T02:00 (local time), 2026-12-24T02:00Z, or +90m, +2h, +1d",
        ) from error
