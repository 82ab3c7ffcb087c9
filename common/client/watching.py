"""Follow a job over server-sent events without losing or repeating one, whatever breaks in between.

`Cursor` knows what was seen; the two clients only move bytes and sleep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import httpx2

from common.client.answers import parse
from common.client.errors import ApiError, CannotConnect, UnexpectedAnswer, answer_error, connection_error
from common.client.retries import Retries
from common.errors import TuneryError
from common.schemas.jobs import TERMINAL, Event, JobRead, Metric

Update = Event | Metric | JobRead
J = TypeVar("J", bound=JobRead)

# Servers ping every 15 s: a silence of four pings is a dead connection.
STREAM_TIMEOUT_S = 60


@dataclass
class Cursor:
    """What was seen of a job's stream. `patience_s`: how long a server may be away before the watch gives up."""

    url: str
    after: int = 0
    patience_s: float = 300.0
    retries: Retries = field(default_factory=Retries)
    clock: Callable[[], float] = monotonic
    finished: bool = False
    _failures: int = 0
    _heard_at: float | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers that ask for what follows the cursor."""
        headers = {"accept": "text/event-stream", "cache-control": "no-store"}
        return headers | {"last-event-id": str(self.after)} if self.after else headers

    def take(self, message: httpx2.ServerSentEvent, job_type: type[J]) -> Event | Metric | J | None:
        """Return what the message says, or None for one of a kind that this client does not know, or a repeated one."""
        self._heard()
        if message.event == "job":
            job = parse(job_type, _document(message))
            self.finished = job.status in TERMINAL
            self._move(message.id)
            return job
        kinds: dict[str, type[Event] | type[Metric]] = {"event": Event, "metric": Metric}
        kind = kinds.get(message.event)
        if kind is None or not self._move(message.id):
            return None
        return parse(kind, _document(message))

    def _move(self, identifier: str) -> bool:
        """Advance to the message's cursor; False if it was already passed."""
        if not identifier.isdecimal():
            return True
        position = int(identifier)
        if position <= self.after:
            return False
        self.after = position
        return True

    def _heard(self) -> None:
        self._failures = 0
        self._heard_at = self.clock()

    def pause_s(self, error: Exception | None) -> float:
        """Return the pause before connecting again, after a failure or the stream's plain end.

        Raises:
            TuneryError: the error is one that waiting does not mend, or patience is at its end.
        """
        now = self.clock()
        self._heard_at = now if self._heard_at is None else self._heard_at
        self._failures += 1
        failure = _as_failure(self.url, error)
        if failure is not None and not _may_pass(failure):
            raise failure from error
        if failure is not None and now - self._heard_at > self.patience_s:
            raise failure from error
        return self.retries.pause_s(self._failures)


class Patience:
    """How long a caller waits for a job. Without a limit, for ever."""

    def __init__(self, timeout_s: float | None, clock: Callable[[], float] = monotonic):
        self._timeout_s = timeout_s
        self._clock = clock
        self._asked_at = self._started_at = clock()

    def left_s(self) -> float:
        """Return the seconds that are left, and note that the server is asked now."""
        self._asked_at = self._clock()
        return math.inf if self._timeout_s is None else self._started_at + self._timeout_s - self._asked_at

    def pause_s(self, job: JobRead) -> float:
        """Return the pause before the next question: a server that does not hold answers back is asked once a second.

        Raises:
            TimeoutError: the time is over.
        """
        now = self._clock()
        left_s = math.inf if self._timeout_s is None else self._started_at + self._timeout_s - now
        if left_s <= 0:
            raise TimeoutError(f"job {job.id} is still {job.status} after {self._timeout_s:g} s")
        return min(left_s, max(0.0, self._asked_at + 1.0 - now))


def opened(response: httpx2.Response) -> None:
    """Raise the answer's error, if it is one. Its body must have been read."""
    if response.status_code >= 400:
        raise answer_error(response)


def _as_failure(url: str, error: Exception | None) -> TuneryError | None:
    if isinstance(error, httpx2.SSEError):
        hint = "check that the URL is that of a Tunery server, and that no proxy rewrites its event stream"
        return UnexpectedAnswer(f"{url} answered no event stream: {error}", hint=hint)
    if isinstance(error, httpx2.TransportError):
        return connection_error(url, error)
    return error if isinstance(error, TuneryError) else None


def _may_pass(failure: TuneryError) -> bool:
    if isinstance(failure, ApiError):
        return failure.status == 429 or failure.status >= 500
    return isinstance(failure, CannotConnect)


def _document(message: httpx2.ServerSentEvent) -> Any:
    try:
        return json.loads(message.data)
    except ValueError as error:
        raise UnexpectedAnswer(f"the event stream holds a {message.event!r} that is not JSON") from error


def columns(metrics: list[Metric], kind: str) -> dict[str, list[Any]]:
    """Return metrics of one kind as equally long columns, `step` first; a value that a step lacks is None."""
    rows = [metric for metric in metrics if metric.kind == kind]
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    return {"step": [row.step for row in rows]} | {name: [row.values.get(name) for row in rows] for name in names}
