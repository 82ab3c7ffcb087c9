"""Delivers webhooks: takes what is due out of the outbox, sends it, notes how that went.

A thread of its own with an event loop, so that a receiver that is slow or away holds up neither the sweeper nor other
receivers. Any number of processes may deliver at once: each delivery is leased to one of them.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from common.context import Context
from common.db import refusals
from common.webhooks import outbox
from common.webhooks.outbox import Due, Result
from worker import posting

T = TypeVar("T")

_POLL_S = 1.0
_AWAY_S = 5.0
# Deliveries under way at once.
_MOST = 32
# For those that are under way when the process is told to leave; others send them again.
_LEAVE_S = 5.0
_log = logging.getLogger(__name__)


class Deliverer:
    """Delivers until `stopped` is set."""

    def __init__(self, context: Context, stopped: threading.Event):
        self._context = context
        self._stopped = stopped
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        # One for the database; and for names, whose servers may be slow or silent, others.
        self._database = ThreadPoolExecutor(1, "webhooks-database")
        self._names = ThreadPoolExecutor(_MOST, "webhooks-names")
        self._under_way: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to deliver, in a thread."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which comes soon after `stopped`."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._run_until_stopped()
        finally:
            self._database.shutdown(wait=False, cancel_futures=True)
            self._names.shutdown(wait=False, cancel_futures=True)

    def _run_until_stopped(self) -> None:
        try:
            tls = ssl.create_default_context(cafile=self._context.settings.ca_bundle)
            asyncio.run(self._deliver(tls))
        except Exception:
            # Whatever it was, webhooks must not end with it: what was under way is sent again after its lease.
            _log.exception("delivering webhooks broke off")
            self._under_way.clear()
            self._stopped.wait(_AWAY_S)

    async def _deliver(self, tls: ssl.SSLContext) -> None:
        tasks: set[asyncio.Task[None]] = set()
        while not self._stopped.is_set():
            pause_s = _POLL_S
            try:
                for due in await self._claimed(_MOST - len(tasks)):
                    task = asyncio.create_task(self._one(due, tls))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            except (DBAPIError, PoolTimeout) as error:
                _log.warning("%s; no webhooks are delivered", refusals.logged(error))
                pause_s = _AWAY_S
            await self._pause(pause_s, tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=_LEAVE_S)

    async def _pause(self, pause_s: float, tasks: set[asyncio.Task[None]]) -> None:
        """Wait, but no longer than until a delivery ends, since more may be due for the same webhook."""
        if not tasks:
            await asyncio.sleep(pause_s)
            return
        await asyncio.wait(tasks, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)

    async def _claimed(self, most: int) -> list[Due]:
        if most <= 0:
            return []
        busy = list(self._under_way)

        def claim() -> list[Due]:
            with self._context.write() as session:
                return outbox.claim(session, most, busy)

        claimed = await self._asked(claim)
        self._under_way.update(due.webhook_id for due in claimed)
        return claimed

    async def _one(self, due: Due, tls: ssl.SSLContext) -> None:
        try:
            result = await posting.post(due, self._context.settings, tls, self._names)
            state = await self._asked(lambda: self._settled(due, result))
        except (DBAPIError, PoolTimeout) as error:
            # Its lease ends, and it is sent once more.
            _log.warning("%s: how it went was not noted (%s)", due.id, type(error).__name__)
        else:
            # Neither the URL nor what was sent: both may hold what is nobody else's business.
            said = result.error or result.answer
            _log.info("%s for %s, attempt %d: %s (%s)", due.id, due.webhook_id, due.attempt, state or "too late", said)
        finally:
            self._under_way -= Counter([due.webhook_id])

    def _settled(self, due: Due, result: Result) -> str | None:
        with self._context.write() as session:
            return outbox.settle(session, due, result)

    async def _asked(self, question: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._database, question)
