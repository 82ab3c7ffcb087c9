"""Completions of large uploads: minutes of reading, each in a thread of a few that are kept apart for them.

A call that waits holds no thread, and one that breaks off ends nothing: asked again, it finds the work under way.
"""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import anyio
from anyio import to_thread

from common import direct_uploads
from common.context import Context
from common.direct_uploads import Standing

_AT_ONCE = 4


class Finishing:
    """The completions that this process is at. Used from its event loop only."""

    def __init__(self, context: Context):
        self._context = context
        self._tasks: dict[tuple[str, str], asyncio.Task[Standing]] = {}
        self._threads = anyio.CapacityLimiter(_AT_ONCE)
        self._stopped = threading.Event()

    async def finish(self, tenant: str, upload_id: str, wait_s: float) -> Standing | None:
        """Return the completed upload, or None where it takes longer than `wait_s`; the work goes on.

        Raises:
            TuneryError: what `direct_uploads.complete` raises.
        """
        name = (tenant, upload_id)
        task = self._tasks.get(name)
        if task is None:
            work = partial(direct_uploads.complete, self._context, tenant, upload_id, self._stopped.is_set)
            task = asyncio.ensure_future(to_thread.run_sync(work, limiter=self._threads))
            self._tasks[name] = task
            task.add_done_callback(partial(self._forget, name))
        # Not wait_for: it would cancel the work.
        await asyncio.wait({task}, timeout=wait_s)
        return task.result() if task.done() else None

    def close(self) -> None:
        """Let the work end at its next chunk, so that no file keeps the process from ending."""
        self._stopped.set()

    def _forget(self, name: tuple[str, str], task: asyncio.Task[Standing]) -> None:
        del self._tasks[name]
        if not task.cancelled():
            # Nobody may be waiting any more; the next call meets the error again.
            task.exception()
