"""Writes what a trainer says into the database: at once what matters, the rest gathered, at most once a second."""

from __future__ import annotations

import logging
import time
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from common.context import Context
from common.jobs import lifecycle
from common.jobs.lifecycle import Claim, Event, MetricPoint
from worker.trainer.protocol import Message, Metrics, Note, Progress, Stage

FLUSH_S = 1.0
_PENDING_MAX = 10_000
_log = logging.getLogger(__name__)


class Recorder:
    """Gathers a child's messages. A database that is away costs nothing but time: what is gathered waits for it."""

    def __init__(self, context: Context, claim: Claim):
        self._context = context
        self._claim = claim
        self._progress: dict[str, Any] = {}
        self._events: list[Event] = []
        self._metrics: list[MetricPoint] = []
        self._flushed_at = 0.0

    def take(self, message: Message) -> None:
        """Remember a message that belongs into the job's history; others are not this class's."""
        if isinstance(message, Stage):
            self._progress["stage"] = message.stage
        elif isinstance(message, Note):
            self._events.append(Event(message.name, message.message, message.level, message.data))
        elif isinstance(message, Progress):
            self._progress |= {
                "step": message.step,
                "max_steps": message.max_steps,
                "eta_s": message.eta_s,
                "tokens_per_s": message.tokens_per_s,
            }
        elif isinstance(message, Metrics):
            self._metrics.append(MetricPoint(message.step, message.values, message.kind))
            if "loss" in message.values and message.kind == "train":
                self._progress["loss"] = message.values["loss"]

    def event(self, name: str, text: str, level: str = "info", **data: Any) -> None:
        """Add an event of the supervisor's own."""
        self._events.append(Event(name, text, level, data))

    def stage(self, name: str) -> None:
        """Note the stage at once: people watch it."""
        self._progress["stage"] = name
        self.flush()

    def flush_if_due(self) -> None:
        """Write what is gathered if the last time is a second ago."""
        if time.monotonic() - self._flushed_at >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered.

        Raises:
            LeaseLost: the attempt no longer owns the job.
        """
        self._flushed_at = time.monotonic()
        if not (self._progress or self._events or self._metrics):
            return
        try:
            with self._context.write() as session:
                lifecycle.advance(
                    session, self._claim, progress=self._progress, events=self._events, metrics=self._metrics
                )
        except (DBAPIError, PoolTimeout) as error:
            _log.warning("%s: the database did not take a report (%s)", self._claim.job_id, type(error).__name__)
            del self._metrics[:-_PENDING_MAX], self._events[:-_PENDING_MAX]
            return
        self._progress, self._events, self._metrics = {}, [], []
