"""Tunery's own processes for tests: started as an operator would, killed as a fault would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from common.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]


def environment(settings: Settings) -> dict[str, str]:
    """Return `settings` as the environment variables that a process reads them from."""
    found = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LANG": "C.UTF-8"}
    found |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for name, value in settings:
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if isinstance(value, list):
            value = ",".join(value)
        if value is not None:
            found[PREFIX + name.upper()] = str(value)
    return found


class Process:
    """One process, its log, and what may be done to it."""

    def __init__(self, name: str, arguments: list[str], variables: dict[str, str], log: Path):
        self.name = name
        self.log = log
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments], env=variables, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=stream, start_new_session=True, cwd=ROOT,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        if self.running:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for the end and return the exit code."""
        return self._process.wait(timeout_s)

    def end(self) -> None:
        """Stop it in order, or by force after ten seconds."""
        if self.running:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def said(self) -> str:
        """Return its log."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        """Wait until its log holds `text`."""
        wait_until(lambda: text in self.said() or not self.running, timeout_s, f"{self.name} to say {text!r}")
        assert text in self.said(), f"{self.name} ended:\n{self.said()[-3000:]}"


class Processes:
    """The processes of one test; none outlives it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._started: list[Process] = []

    def start(self, name: str, arguments: list[str], settings: Settings, **variables: str) -> Process:
        """Start `python -m` with `arguments` under `settings`."""
        made = Process(name, arguments, environment(settings) | variables, self._folder / f"{name}.log")
        self._started.append(made)
        return made

    def end(self) -> None:
        """End all."""
        for process in reversed(self._started):
            process.end()


def wait_until(seen: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until `seen()`; fail the test with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        threading.Event().wait(0.05)
