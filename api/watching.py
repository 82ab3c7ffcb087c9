"""Waiting for jobs to change: one query for everybody in this process who waits, not one loop for each.

Whoever waits holds no thread and no connection, so thousands may.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from common.context import Context
from common.db.rows import JobRow

POLL_S = 0.25
_AWAY_S = 2.0
_BATCH = 500
_log = logging.getLogger(__name__)


class Subscription:
    """Somebody who waits for a job to leave `version`."""

    def __init__(self, job_id: str, version: int):
        self.job_id = job_id
        self.version = version
        self.changed = asyncio.Event()

    async def wait(self, timeout_s: float) -> bool:
        """Return whether the job changed (or left) within `timeout_s`, or the server is closing."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.changed.wait()
        except TimeoutError:
            return False
        return True

    def saw(self, version: int) -> None:
        """Wait from now on for the job to leave `version`."""
        self.version = version
        self.changed.clear()


class Watcher:
    """Looks at the versions of the jobs that somebody waits for, while there is somebody."""

    def __init__(self, context: Context):
        self._context = context
        self._subscriptions: set[Subscription] = set()
        self._poller: asyncio.Task[None] | None = None
        self.closed = False

    @contextmanager
    def subscribe(self, job_id: str, version: int) -> Iterator[Subscription]:
        """Yield a subscription to a job that was last seen at `version`. From within the event loop only."""
        subscription = Subscription(job_id, version)
        self._subscriptions.add(subscription)
        if self.closed:
            subscription.changed.set()
        elif self._poller is None or self._poller.done():
            self._poller = asyncio.get_running_loop().create_task(self._poll())
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def close(self) -> None:
        """Wake everybody: streams end, long polls answer what is."""
        self.closed = True
        for subscription in self._subscriptions:
            subscription.changed.set()

    async def _poll(self) -> None:
        while self._subscriptions and not self.closed:
            waiting = [each for each in self._subscriptions if not each.changed.is_set()]
            pause_s = POLL_S
            try:
                versions = await run_in_threadpool(self._versions, sorted({each.job_id for each in waiting}))
            except SQLAlchemyError as error:
                _log.warning("the versions of watched jobs could not be read: %s", error)
                pause_s = _AWAY_S
            else:
                for each in waiting:
                    if versions.get(each.job_id) != each.version:
                        each.changed.set()
            await asyncio.sleep(pause_s)

    def _versions(self, job_ids: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._context.read() as session:
            for start in range(0, len(job_ids), _BATCH):
                batch = job_ids[start : start + _BATCH]
                query = select(JobRow.id, JobRow.version).where(JobRow.id.in_(batch))
                found.update((row.id, row.version) for row in session.execute(query))
        return found
