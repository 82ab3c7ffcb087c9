"""Processes of a fault run: started under a leash, killed, frozen, and started again by a keeper, as a host would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from common.embedded import leash

_LEASH = (sys.executable, "-I", "-S", str(Path(leash.__file__)))
_LOOK_S = 0.05
_TERM_S = 10.0


class Service:
    """One process that is to run. `is_ready` says whether it answers."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        is_ready: Callable[[], bool] = lambda: True,
        *,
        lasting: bool = False,
    ):
        self.name = name
        # A server that others need until they have ended; it survives SIGKILL, so it need not be asked to leave.
        self.lasting = lasting
        self.log = log
        self.is_ready = is_ready
        self.before_start: Callable[[], None] = lambda: None
        self._argv = [*_LEASH, str(os.getpid()), *argv]
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. The calling thread must live as long as the process may."""
        self.before_start()
        self.before_start = lambda: None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=Path(__file__).parents[2],
            )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the present run."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def trainer(self) -> psutil.Process | None:
        """The trainer that this worker has now."""
        try:
            children = psutil.Process(self.pid).children() if self.running else []
            return next((child for child in children if "tests.faults.hash_trainer" in child.cmdline()), None)
        except psutil.NoSuchProcess:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as the kernel does, and wait for that."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def wait(self, timeout_s: float) -> int | None:
        """Return its exit code, or None if it does not end in time."""
        assert self._process is not None, f"{self.name} was never started"
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        """Return its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Keeper:
    """Starts services, and starts again what has died, after a random time of `pause_s`."""

    def __init__(self, randomness: random.Random, pause_s: tuple[float, float]):
        self.services: dict[str, Service] = {}
        self._random = randomness
        self._pause_s = pause_s
        self._due: dict[str, float] = {}
        self._wanted: list[Service] = []
        self._closing = threading.Event()
        self._changed = threading.Condition()
        # One thread starts everything: the leash kills a process when the thread that started it ends.
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    def start(self, *services: Service, timeout_s: float = 60.0) -> None:
        """Start `services` and wait until each is ready."""
        with self._changed:
            self._wanted += services
        deadline = time.monotonic() + timeout_s
        for service in services:
            while service.name not in self.services or not (service.running and service.is_ready()):
                if time.monotonic() > deadline:
                    raise AssertionError(f"{service.name} is not ready:\n{service.said()[-3000:]}")
                time.sleep(_LOOK_S)

    def close(self) -> None:
        """End everything: the servers last, and by force what does not leave by itself."""
        self._closing.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._closing.wait(_LOOK_S):
            with self._changed:
                fresh, self._wanted = self._wanted, []
            for service in fresh:
                service.start()
                self.services[service.name] = service
            for service in self.services.values():
                self._revive(service)
        # Here, since the leash would kill all of them with this thread.
        leaving = [service for service in self.services.values() if not service.lasting]
        for number in (signal.SIGCONT, signal.SIGTERM):
            for service in leaving:
                service.signal(number)
        deadline = time.monotonic() + _TERM_S
        for service in leaving:
            service.wait(max(0.0, deadline - time.monotonic()))
        for service in reversed(self.services.values()):
            service.kill()

    def _revive(self, service: Service) -> None:
        if service.running:
            return
        now = time.monotonic()
        due = self._due.setdefault(service.name, now + self._random.uniform(*self._pause_s))
        if now >= due:
            del self._due[service.name]
            service.start()


def processes_of(folder: Path) -> list[str]:
    """Return the processes of this machine whose words, environment or working folder name `folder`."""
    mark = str(folder).encode()
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [
        f"{entry.name} {words.replace(bytes(1), b' ').decode(errors='replace')}"
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and int(entry.name) not in mine
        for words, others in [_traces(entry)]
        if mark in words + others
    ]


def _traces(entry: Path) -> tuple[bytes, bytes]:
    try:
        return (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes() + bytes((entry / "cwd").readlink())
    except OSError:  # it has just ended
        return b"", b""
