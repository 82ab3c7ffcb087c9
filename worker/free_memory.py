"""How much of a worker's card others leave free, as its reports say.

It is measured while the worker holds nothing there, and what was measured last holds while it does: a warm trainer
gives its memory up when a job needs it, so it must not count, and it cannot be subtracted, since in a container the
driver names processes by ids that are not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from common.cards import free_bytes
from worker.workplace import Device

EVERY_S = 30.0


class FreeMemory:
    """Measures in a thread of its own: a driver that hangs must not silence the worker.

    `mark` returns another number after each process that was given the card, and None while one has it.
    """

    def __init__(self, device: Device, mark: Callable[[], int | None], look: Callable[[str], int | None] = free_bytes):
        self._device = device.device
        self._mark = mark
        self._look = look
        self._closed = threading.Event()
        self.bytes: int | None = None

    def start(self) -> None:
        """Begin to measure, where there is a card."""
        if self._device.startswith("cuda"):
            threading.Thread(target=self._go_on, name="free-memory", daemon=True).start()

    def close(self) -> None:
        """Measure no more."""
        self._closed.set()

    def measure(self) -> None:
        """Measure once, unless a process of the worker's has the card or is given it meanwhile."""
        before = self._mark()
        if before is None:
            return
        found = self._look(self._device)
        if self._mark() == before:
            self.bytes = found

    def _go_on(self) -> None:
        while True:
            self.measure()
            if self._closed.wait(EVERY_S):
                return
