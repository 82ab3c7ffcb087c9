"""Supervises child processes: starts them in order, starts again what dies, stops all in reverse order.

Every method is for the main thread: a child is killed by the kernel when the thread that started it ends (leash.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import InfraError

_LEASH = Path(__file__).with_name("leash.py")
_POLL_S = 0.05
# A child that dies at once is started again once a second; one that lived this long, immediately.
_STEADY_S = 5.0
_RESTART_PAUSE_S = 1.0
_LOG_BYTES = 16 * 2**20
_LOG_TAIL_BYTES = 4000


@dataclass(frozen=True)
class Child:
    """What to run and how to end it.

    `rank` orders the stop: the highest first, equal ones together. `grace_s` is the time between SIGTERM and SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    rank: int = 0
    grace_s: float = 10.0


@dataclass
class _Running:
    child: Child
    process: subprocess.Popen[bytes]
    started: float
    start_again_at: float | None = field(default=None)


class Children:
    """The running children of this process. `say` receives a line when one died and was started again."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._running: dict[str, _Running] = {}

    def start(self, child: Child, ready: Callable[[], bool] | None = None, timeout_s: float = 60.0) -> None:
        """Start `child` and, if `ready` is given, wait until it returns true.

        Raises:
            InfraError: the child ended, or was not ready after `timeout_s`; the end of its log is in the message.
            ValueError: a child of that name is running.
        """
        if child.name in self.pids():
            raise ValueError(f"{child.name} is already running")
        running = _Running(child, _spawn(child), time.monotonic())
        self._running[child.name] = running
        deadline = time.monotonic() + timeout_s
        while ready is not None and not ready():
            if running.process.poll() is not None:
                raise InfraError(
                    f"{child.name} {_how_it_ended(running.process)} while starting.\n{log_tail(child.log)}"
                )
            if time.monotonic() > deadline:
                raise InfraError(f"{child.name} was not ready after {timeout_s:.0f} s.\n{log_tail(child.log)}")
            time.sleep(_POLL_S)

    def revive(self) -> None:
        """Start again what has died. Call it several times a second."""
        for running in self._running.values():
            if running.process.poll() is not None:
                self._revive(running)

    def _revive(self, running: _Running) -> None:
        now = time.monotonic()
        if running.start_again_at is None:
            steady = now - running.started >= _STEADY_S
            running.start_again_at = now if steady else now + _RESTART_PAUSE_S
            self._say(f"{running.child.name} {_how_it_ended(running.process)}; starting it again ({running.child.log})")
        if now >= running.start_again_at:
            running.process, running.started, running.start_again_at = _spawn(running.child), now, None

    def pids(self) -> dict[str, int]:
        """Return the process id of every child that is alive, by name, in order of their start."""
        return {name: item.process.pid for name, item in self._running.items() if item.process.poll() is None}

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End every child: SIGTERM, after its grace period SIGKILL; higher ranks before lower ones.

        When `hurry` returns true the grace periods are over.
        """
        for rank in sorted({item.child.rank for item in self._running.values()}, reverse=True):
            group = [item for item in self._running.values() if item.child.rank == rank]
            for running in reversed(group):
                _signal(running.process, signal.SIGTERM)
            _await_end(group, hurry)
        self._running.clear()


def run_to_end(child: Child, timeout_s: float = 300.0) -> None:
    """Run `child` once and wait for it.

    Raises:
        InfraError: its exit code was not 0, or it took longer than `timeout_s`; the end of its log is in the message.
    """
    process = _spawn(child)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise InfraError(f"{child.name} took longer than {timeout_s:.0f} s.\n{log_tail(child.log)}") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise InfraError(f"{child.name} {_how_it_ended(process)}.\n{log_tail(child.log)}")


def log_tail(log: Path) -> str:
    """Return the last lines of the file `log`."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in lines[-20:])])


def _spawn(child: Child) -> subprocess.Popen[bytes]:
    child.log.parent.mkdir(parents=True, exist_ok=True)
    if child.log.exists() and child.log.stat().st_size > _LOG_BYTES:
        child.log.replace(child.log.with_suffix(".log.1"))
    # -I -S: the leash needs no site packages and must not be influenced by the environment it hands on.
    leash = (sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()))
    with child.log.open("ab") as log:
        return subprocess.Popen(
            [*leash, *child.argv],
            env=dict(child.environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C on the terminal must reach the supervisor alone: it stops its children in order.
            start_new_session=True,
        )


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # The whole group only for SIGKILL: on SIGTERM a child ends its own children in its own order.
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)


def _await_end(group: list[_Running], hurry: Callable[[], bool]) -> None:
    started = time.monotonic()
    for running in group:
        while running.process.poll() is None:
            if hurry() or time.monotonic() - started > running.child.grace_s:
                _signal(running.process, signal.SIGKILL)
                running.process.wait()
            else:
                time.sleep(_POLL_S)
