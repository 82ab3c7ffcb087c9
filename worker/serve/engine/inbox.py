"""What the server has said and the model has not yet heard."""

from __future__ import annotations

import threading
from typing import Any

from worker.serve.protocol import Cancel, Command, read


class Inbox:
    """Commands in order. A thread fills it; the model looks into it between batches, and for cancels at each token."""

    def __init__(self) -> None:
        self._waiting: list[Command] = []
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()

    def obey(self, command: Any) -> None:
        """Take one command, as it was sent."""
        found = read(command)
        with self._changed:
            if isinstance(found, Cancel):
                self._cancelled.add(found.id)
            else:
                self._waiting.append(found)
            self._changed.notify()

    def take(self, *, wait: bool) -> list[Command]:
        """Return all commands; with `wait`, at least one."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._waiting)
            taken, self._waiting = self._waiting, []
            return taken

    def is_cancelled(self, ask_id: str) -> bool:
        """Whether nobody waits for that answer any more."""
        return ask_id in self._cancelled

    def forget(self, ask_id: str) -> None:
        """Drop what is known of an answer that is at its end."""
        with self._changed:
            self._cancelled.discard(ask_id)
