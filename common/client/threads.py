"""Files and hashes are work for a thread: what the client of threads does, for the one of event loops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

import anyio.to_thread

from common.client.sending import Progress
from common.client.transport import AsyncTransport, Transport
from common.errors import InfraError

T = TypeVar("T")


async def in_thread(
    transport: AsyncTransport, on_progress: Progress | None, work: Callable[[Transport, Progress], T]
) -> T:
    """Run `work` in a thread with a transport of its own, and with what it tells its progress to.

    A cancelled task stops it at the next chunk; what was transferred until then is kept.
    """
    stop = threading.Event()

    def report(name: str, done: int, total: int) -> None:
        if stop.is_set():
            raise InfraError(f"{name} was given up", code="cancelled")
        if on_progress is not None:
            on_progress(name, done, total)

    def run() -> T:
        with closing(Transport(transport.address, transport.retries)) as own:
            return work(own, report)

    try:
        return await anyio.to_thread.run_sync(run, abandon_on_cancel=True)
    finally:
        stop.set()
