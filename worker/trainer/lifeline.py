"""What the parent wishes of this process, and the ways in which it ends when the parent is gone."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from worker.trainer.faults import CRASHED, Drained
from worker.trainer.protocol import DRAINED

_PR_SET_PDEATHSIG = 1
_WATCH_S = 0.5
# The deadline is five sixths of a lease: what is left of the lease is a fifth of the time to the deadline.
_GRACE_SHARE = 0.2
_GRACE_MIN_S = 1.0


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Wishes:
    """The latest commands. The run asks between steps whether it should stop; threads keep the answer current.

    A process may work on one run after the other. What is wished of one never reaches the next: not even its deadline,
    should the command arrive late.
    """

    def __init__(self, name: str | None = None) -> None:
        self._lock = threading.Lock()
        self._next: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._name = name
        self._resting = False
        self._forget()

    def _forget(self) -> None:
        self._stopped = False
        self._deadline: float | None = None
        self._overdue = float("inf")

    def obey(self, command: object) -> None:
        """Take one command. One that is not understood is passed over: a newer supervisor may say more."""
        if not isinstance(command, dict):
            return
        moment = command.get("monotonic")
        deadline = float(moment) if isinstance(moment, (int, float)) else None
        with self._lock:
            if command.get("do") == "run" and isinstance(command.get("folder"), str):
                self._begin(Path(command["folder"]), deadline)
            elif self._resting or command.get("run", self._name) != self._name:
                return
            elif command.get("do") == "stop":
                self._stopped = True
            elif command.get("do") == "run":
                self._stopped = False
            elif command.get("do") == "deadline" and deadline is not None:
                self._set_deadline(deadline, time.monotonic())

    def _begin(self, folder: Path, deadline: float | None) -> None:
        self._forget()
        self._name, self._resting = folder.name, False
        if deadline is not None:
            self._set_deadline(deadline, time.monotonic())
        self._next.put(folder)

    def rest(self) -> None:
        """Drop what was wished of the run that has ended; nothing is wished until the next one."""
        with self._lock:
            self._forget()
            self._resting = True

    def next_run(self) -> Path:
        """Wait for the folder of the next run."""
        return self._next.get()

    def _set_deadline(self, deadline: float, now: float) -> None:
        self._deadline = deadline
        self._overdue = max(deadline, now) + max(_GRACE_MIN_S, _GRACE_SHARE * (deadline - now))

    def reason(self) -> str | None:
        """Return why the run should make a checkpoint and leave, or None."""
        with self._lock:
            if self._stopped:
                return "the worker was asked to stop"
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return "the lease was not renewed in time"
        return None

    def leave_if_asked(self) -> None:
        """Raise Drained if the run should stop; for moments with nothing to keep."""
        if reason := self.reason():
            raise Drained(reason)

    def overdue(self) -> bool:
        """Return whether the deadline passed so long ago that another worker may own the job."""
        with self._lock:
            return time.monotonic() >= self._overdue


def listen(
    pipe: BinaryIO, obey: Callable[[object], None], leave: Callable[[int], object] = os._exit
) -> threading.Thread:
    """Read commands from `pipe` on a thread of its own. At its end the parent is gone, and so is the process."""

    def read() -> None:
        for line in pipe:
            try:
                obey(json.loads(line))
            except ValueError:
                continue
        leave(CRASHED)

    return _start(read, "commands")


def watch(parent: int, overdue: Callable[[], bool], leave: Callable[[int], object] = os._exit) -> threading.Thread:
    """Leave at once when the parent process has changed, or the run did not heed its deadline."""

    def look() -> None:
        while True:
            if os.getppid() != parent:
                leave(CRASHED)
                return
            if overdue():
                leave(DRAINED)
                return
            time.sleep(_WATCH_S)

    return _start(look, "lifeline")


def _start(target: Callable[[], object], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
