"""The trainer process of a worker, which may outlive a run: with its base in memory the next job starts at once.

At most one waits. It is ended by a job that wants another base, when it has waited for `TUNERY_WARM_BASE_S`, and with
the worker; so are the processes of runs that did not end well, which never come here.
"""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from common.settings import Settings
from worker.child import Child
from worker.trainer import protocol
from worker.trainer.protocol import Message

_log = logging.getLogger(__name__)


class Trainers:
    """Starts trainers in the folder `home`, and keeps the one that waits for its next run."""

    def __init__(self, settings: Settings, home: Path):
        self._module = settings.trainer_module
        self._keep_s = settings.warm_base_s
        self._home = home
        self._lock = threading.Lock()
        self._child: Child[Message] | None = None
        self._key: str | None = None
        self._timer: threading.Timer | None = None
        self._closed = False
        self._last: Child[Message] | None = None
        self._num_started = 0

    def start(self, folder: Path) -> Child[Message]:
        """Start a trainer with the run in `folder`."""
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir()
        self._num_started += 1
        self._last = Child([self._module, str(folder)], self._home, protocol.decode)
        return self._last

    def mark(self) -> int | None:
        """Return how many trainers were started, or None while there is one."""
        return self._num_started if self._last is None or self._last.ended else None

    def take(self, key: str | None) -> Child[Message] | None:
        """Return the waiting trainer if its base is the one that `key` stands for; end it otherwise."""
        with self._lock:
            child, fits = self._child, key is not None and key == self._key
            self._forget()
        if child is None:
            return None
        if fits and not child.ended:
            child.clear_log()
            return child
        _end(child)
        return None

    def keep(self, child: Child[Message], key: str | None) -> None:
        """Let a trainer that has ended its run wait for another one; without a `key` it ends."""
        if key is None or self._closed:
            _end(child)
            return
        with self._lock:
            self._child, self._key = child, key
            self._timer = threading.Timer(self._keep_s, self._let_go, [child])
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """End the trainer that waits; from now on none does."""
        self._closed = True
        self.take(None)

    def _let_go(self, child: Child[Message]) -> None:
        with self._lock:
            if self._child is not child:
                return
            self._forget()
        _log.info("the base in memory was not wanted for %.0f s: its process ends", self._keep_s)
        _end(child)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._child = self._key = self._timer = None


def _end(child: Child[Message]) -> None:
    child.kill()
    child.wait()
