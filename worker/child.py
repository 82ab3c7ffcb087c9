"""A process that runs model code: started without credentials, spoken to over pipes, ended as a whole group.

Its parent knows it by its module's name and the words that both use: `worker.trainer.protocol` for a trainer,
`worker.serve.protocol` for the model behind chat completions.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from common.settings import trainer_environment

_log = logging.getLogger(__name__)
_LOG_TAIL_BYTES = 8192

# The parent-death signal fires when the *thread* that spawned a child ends. This one lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


M = TypeVar("M")


class Child(Generic[M]):
    """One child process. `messages` yields what it says, read by `decode`, and at the end of its output None."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        decode: Callable[[bytes], M],
        *,
        address_space_bytes: int | None = None,
    ):
        self.folder = folder
        self.messages: queue.Queue[M | None] = queue.Queue()
        self._decode = decode
        self._log_path = folder / "trainer.log"
        self._lock = threading.Lock()
        self._process = _spawner.submit(self._spawn, arguments).result()
        if address_space_bytes:
            resource.prlimit(self._process.pid, resource.RLIMIT_AS, (address_space_bytes, address_space_bytes))
        self._reader = threading.Thread(target=self._read, name="child-reader", daemon=True)
        self._reader.start()

    def _spawn(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                # -P: the working folder holds users' files and must not be searched for modules.
                [sys.executable, "-P", "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env=trainer_environment(),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The child's process id, which is also its group's."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended; one that it started may still hold its output open."""
        return self._process.poll() is not None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self.messages.put(self._decode(line))
            except ValueError as error:
                _log.warning("%s", error)
        self.messages.put(None)

    def say(self, **command: Any) -> None:
        """Send a command; a child that has already gone hears nothing, which its exit code will tell."""
        try:
            with self._lock:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            _log.debug("the child %d no longer listens", self.pid)

    def kill(self) -> None:
        """End the child and everything that it started, at once."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def wait(self) -> int:
        """Wait for the end and return the exit code, negative for a signal. Leaves no process of the group behind."""
        code = self._process.wait()
        self.kill()
        self._reader.join(timeout=10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with self._lock:
                    _close(pipe)
        return code

    def clear_log(self) -> None:
        """Forget what the child wrote to its standard error so far."""
        os.truncate(self._log_path, 0)

    def log_tail(self) -> str:
        """Return the end of what the child wrote to its standard error."""
        with self._log_path.open("rb") as log:
            log.seek(max(0, self._log_path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return
