"""When a call may be sent again, and after which pause."""

from __future__ import annotations

import email.utils
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx2

from common.client.calls import Call

# Refused before anything was done: even a request that must not run twice may be sent again.
_REFUSED = frozenset({429, 503})
_PASSING = _REFUSED | {502, 504}
_NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True)
class Retries:
    """How often and how patiently: pauses double from `first_s` to `longest_s`, with jitter.

    A Retry-After of at most `obeyed_s` is waited for; a longer one is handed to the caller as the error it is.
    """

    limit: int = 5
    first_s: float = 0.25
    longest_s: float = 10.0
    obeyed_s: float = 60.0

    def pause_s(self, attempt: int) -> float:
        """Return the pause after the given attempt, counted from 1."""
        return min(self.longest_s, self.first_s * 2.0 ** min(attempt - 1, 16)) * random.uniform(0.7, 1.0)

    def after_error(self, call: Call[Any], attempt: int, error: httpx2.TransportError) -> float | None:
        """Return the pause before the next attempt, or None where the call must not be sent again."""
        safe = call.repeatable or isinstance(error, _NEVER_SENT)
        return self.pause_s(attempt) if safe and attempt < self.limit else None

    def after_answer(self, call: Call[Any], attempt: int, response: httpx2.Response) -> float | None:
        """Return the pause before the next attempt, or None where this answer is final. Obeys Retry-After."""
        passing = _PASSING if call.repeatable else _REFUSED
        if response.status_code not in passing or attempt >= self.limit:
            return None
        asked = retry_after_s(response.headers.get("retry-after"))
        if asked is None:
            return self.pause_s(attempt)
        return asked if asked <= self.obeyed_s else None


def retry_after_s(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number, or an HTTP date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
