"""Tells the supervisor how far a check is, so that whoever waits for a large file sees it move."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from worker.data.source import Watch
from worker.trainer.protocol import Checked, Message

if TYPE_CHECKING:
    from worker.ml.parts import Part

# Each report is a transaction of the supervisor's.
EVERY_S = 1.0


class Gauge:
    """Reports at most once in `EVERY_S`. A file that is read for two parts counts twice."""

    def __init__(self, send: Callable[[Message], None], parts: Sequence[Part]):
        self._send = send
        self._sizes = {part.name: part.source.path.stat().st_size for part in parts}
        self._told_at = time.monotonic()

    def watch(self, part: Part) -> Watch:
        """Return what hears how far `part` is read; the parts before it count as read."""
        names, total = list(self._sizes), sum(self._sizes.values())
        before = sum(self._sizes[name] for name in names[: names.index(part.name)])

        def at(row: int, byte: int) -> None:
            now = time.monotonic()
            if now - self._told_at >= EVERY_S:
                self._told_at = now
                self._send(Checked(part.name, row, min(total, before + byte), total))

        return at
