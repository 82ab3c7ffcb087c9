"""Forks of this process that are killed at a chosen moment: after so long, or at one of their system calls.

What a killed process leaves on disk changes at its system calls only. Counted ones therefore reach every state in
which it can be left, also those that last too short for a clock.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from worker.trainer.lifeline import die_with_parent

_TRACEME, _TO_NEXT_CALL = 0, 24
# No fork has so much to do: one that hangs is an error of the test, which must not hang with it.
_LONGEST_S = 120
_libc = ctypes.CDLL(None, use_errno=True)
# A request and a process, then an address and a value as wide as a pointer: both unused here.
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


@dataclass(frozen=True)
class Fork:
    """A fork that waits to be let go. It stops itself again when it has done what it was made for."""

    pid: int

    def dies_after(self, seconds: float) -> None:
        """Let it run for so long and kill it."""
        os.kill(self.pid, signal.SIGCONT)
        threading.Event().wait(seconds)
        self._kill()

    def dies_at_call(self, number: int) -> None:
        """Let it run to the given entry or exit of a system call, counted from 0, and kill it there."""
        self._follow(number)
        self._kill()

    def seconds(self) -> float:
        """Let it do everything, kill it, and return how long it took."""
        begun = time.monotonic()
        os.kill(self.pid, signal.SIGCONT)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the fork ended by itself: {os.waitstatus_to_exitcode(status)}"
        took = time.monotonic() - begun
        self._kill()
        return took

    def calls(self) -> int:
        """Let it do everything, kill it, and return how many entries and exits of system calls that took."""
        seen = self._follow(None)
        self._kill()
        return seen

    def _follow(self, number: int | None) -> int:
        seen = 0
        while seen != number:
            _ptrace(_TO_NEXT_CALL, self.pid)
            _, status = os.waitpid(self.pid, 0)
            assert os.WIFSTOPPED(status), f"the fork ended by itself: {os.waitstatus_to_exitcode(status)}"
            if (why := os.WSTOPSIG(status)) == signal.SIGSTOP:
                break
            assert why == signal.SIGTRAP, f"the fork was stopped by {signal.Signals(why).name}"
            seen += 1
        return seen

    def _kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSIGNALED(status), f"the fork ended by itself: {os.waitstatus_to_exitcode(status)}"


def fork(*, traced: bool) -> Fork | None:
    """Fork. The parent gets the fork, which stands still; in the fork, let go, the same call returns None."""
    # Python seeds `random` anew in a fork, and its state is a part of what is saved.
    state = random.getstate()
    pid = os.fork()
    if pid == 0:
        random.setstate(state)
        die_with_parent()
        signal.alarm(_LONGEST_S)
        if traced:
            _ptrace(_TRACEME, 0)
        stop()
        return None
    os.waitpid(pid, os.WUNTRACED)
    return Fork(pid)


def stop() -> None:
    """Stand still; a fork says by this that it is done."""
    os.kill(os.getpid(), signal.SIGSTOP)


def may_trace() -> bool:
    """Return whether this system lets a process count the system calls of its forks."""
    pid = os.fork()
    if pid == 0:
        os._exit(_attempted(lambda: _ptrace(_TRACEME, 0)))
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _attempted(act: Callable[[], None]) -> int:
    try:
        act()
    except OSError:
        return 1
    return 0


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) == -1:
        raise OSError(ctypes.get_errno(), "ptrace")
