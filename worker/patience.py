"""Ends a download that nobody should wait for: the attempt is over, or the sender is slow beyond reason.

A read waits for each byte anew, so a host that sends one a minute, in its handshake, its headers or its content, would
hold a worker for years. Another thread looks after the clock and breaks the connection.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from common.errors import SourceSlow

# After so long a download is to have had so many bytes a second on average, and any byte at all.
GRACE_S = 60.0
LEAST_BYTES_PER_S = 256 * 1024
_LOOK_S = 0.5


class Patience:
    """While its block runs: `alive` is asked all the time, and what it raises ends the connections that are `watched`.

    The block then raises the same, or SourceSlow where `received` stayed too small for too long.
    """

    def __init__(self, what: str, alive: Callable[[], None], param: str):
        self.received = 0
        self._what = what
        self._alive = alive
        self._param = param
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._why: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="patience", daemon=True)

    def watch(self, connection: socket.socket) -> None:
        """Break `connection` too when patience ends."""
        # A copy, since TLS takes the socket out of the hands of whoever opened it.
        copy = connection.dup()
        with self._lock:
            self._sockets.append(copy)
            if self._why is not None:
                _break(copy)

    def took(self, num_bytes: int) -> None:
        """Note that so many bytes have come; raises what `alive` does."""
        self._alive()
        self.received += num_bytes

    def __enter__(self) -> Self:
        """Begin to look at the clock."""
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Raise why patience ended, in place of what the broken connection made of it."""
        self._ended.set()
        self._thread.join()
        for copy in self._sockets:
            copy.close()
        if self._why is not None:
            raise self._why from error

    def _look_on(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                self._alive()
                self._check_pace()
            except BaseException as why:
                with self._lock:
                    self._why = why
                    for copy in self._sockets:
                        _break(copy)
                return

    def _check_pace(self) -> None:
        late_s = time.monotonic() - self._began - GRACE_S
        if late_s > self.received / LEAST_BYTES_PER_S:
            raise SourceSlow(
                f"{self._param}: {self._what} sends too slowly ({self.received:,} bytes in {GRACE_S + late_s:.0f} s)",
                param=self._param,
                code="dataset_host_slow",
                hint="Upload the file with POST /datasets.",
            )


def _break(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
