"""The child that holds the model, as the server sees it: started again when it dies, asked over its pipe.

Everything here runs in the event loop, but for two threads: one reads the child's words and starts it again, one
writes to it. Neither may keep the loop waiting, whatever state the child is in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from queue import Empty

from common.errors import InfraError, InvalidInput, TuneryError
from worker.child import Child
from worker.serve import protocol
from worker.serve.protocol import (
    Accepted,
    Ask,
    Cancel,
    Command,
    Load,
    Loaded,
    Message,
    Piece,
    Ready,
    Refused,
    ServeSpec,
    Unload,
)
from worker.trainer.protocol import BAD_INPUT, Failed

_MODULE = "worker.serve.engine"
_POLL_S = 0.5
_PAUSE_MIN_S = 1.0
_PAUSE_MAX_S = 60.0
# One that has lived so long is started again at once.
_STEADY_S = 60.0
_log = logging.getLogger(__name__)


class Hearing:
    """What is heard about one load or answer."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Message | TuneryError] = asyncio.Queue()
        self.finished = False

    async def next(self) -> Message:
        """Return the next message.

        Raises:
            InvalidInput: the model refuses it.
            InfraError: the model died over it.
        """
        message = await self.queue.get()
        self.finished = not isinstance(message, Accepted | Piece)
        if isinstance(message, TuneryError):
            raise message
        if isinstance(message, Refused):
            raise InvalidInput(message.message, code=message.code, param=message.param, hint=message.hint)
        return message


class ModelProcess:
    """The child for `spec`, with its files in `folder`.

    `ready` is what it said when the base was loaded, None while it is not; `failure` says why it cannot be started.
    `on_lost` is called when it has died, and with it every adapter; `on_hopeless`, when starting it again is no use.
    """

    def __init__(self, spec: ServeSpec, folder: Path, stall_s: float):
        self.ready: Ready | None = None
        self.failure: Failed | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_hopeless: Callable[[], None] = lambda: None
        self._folder = folder
        self._stall_s = stall_s
        self._heard: dict[str, Hearing] = {}
        self._heard_at = time.monotonic()
        self._closing = threading.Event()
        self._child: Child[Message] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="to-model")
        spec.write(folder)

    def start(self) -> None:
        """Start the child, and go on doing so until `close`. Must be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._supervisor = threading.Thread(target=self._supervise, name="model", daemon=True)
        self._supervisor.start()

    def close(self) -> None:
        """End the child."""
        self._closing.set()
        if self._child is not None:
            self._child.kill()
        self._supervisor.join()
        self._writer.shutdown()

    @property
    def num_open(self) -> int:
        """How many loads and answers are awaited."""
        return len(self._heard)

    async def load(self, name: str, parts: list[tuple[str, float]]) -> int:
        """Load an adapter and return its bytes in memory.

        Raises:
            InvalidInput: it cannot lie over this base.
            InfraError: the model is not there, or died over it.
        """
        with self._hearing(name) as heard:
            self._say(Load(name, parts))
            message = await heard.next()
            assert isinstance(message, Loaded), message
            return message.bytes

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        self._say(Unload(name))

    @asynccontextmanager
    async def asking(self, ask: Ask) -> AsyncIterator[Hearing]:
        """Ask, and yield what is heard; leaving the block before the end cancels the answer."""
        with self._hearing(ask.id) as heard:
            self._say(ask)
            try:
                yield heard
            finally:
                if not heard.finished:
                    self._say(Cancel(ask.id))

    @contextmanager
    def _hearing(self, of: str) -> Iterator[Hearing]:
        if self.ready is None:
            raise InfraError("the model is being loaded", code="model_loading")
        if not self._heard:
            self._heard_at = time.monotonic()
        heard = self._heard[of] = Hearing()
        try:
            yield heard
        finally:
            del self._heard[of]

    def _say(self, command: Command) -> None:
        child = self._child
        if child is not None and not self._closing.is_set():
            self._writer.submit(child.say, **protocol.written(command))

    def _take(self, message: Message) -> None:
        self._heard_at = time.monotonic()
        if isinstance(message, Ready):
            self.ready, self.failure = message, None
            _log.info("the base is loaded: %s, %s, %d bytes", message.device, message.precision, message.bytes)
        elif isinstance(message, Failed):
            self.failure = message
        else:
            of = message.of if isinstance(message, Refused) else getattr(message, "id", getattr(message, "name", None))
            if heard := self._heard.get(str(of)):
                heard.queue.put_nowait(message)

    def _lose(self, code: int) -> None:
        self.ready = None
        for heard in self._heard.values():
            heard.queue.put_nowait(InfraError("the model died over this and is started again", code="model_died"))
        self.on_lost()
        if code == BAD_INPUT:
            self.on_hopeless()

    # ---- in the supervising thread -----------------------------------------------------------------------------------

    def _supervise(self) -> None:
        pause_s = _PAUSE_MIN_S
        while not self._closing.is_set():
            begun = time.monotonic()
            self._child = Child([_MODULE, str(self._folder)], self._folder, protocol.decode)
            self._relay(self._child)
            code = self._child.wait()
            if self._closing.is_set():
                return
            _log.warning("the model ended with %d:\n%s", code, self._child.log_tail())
            self._loop.call_soon_threadsafe(self._lose, code)
            if code == BAD_INPUT:
                return
            pause_s = _PAUSE_MIN_S if time.monotonic() - begun > _STEADY_S else min(2 * pause_s, _PAUSE_MAX_S)
            self._closing.wait(pause_s)

    def _relay(self, child: Child[Message]) -> None:
        while True:
            try:
                message = child.messages.get(timeout=_POLL_S)
            except Empty:
                silent_s = time.monotonic() - self._heard_at
                if child.ended or self._closing.is_set():
                    child.kill()
                elif self._heard and silent_s > self._stall_s:
                    _log.warning("the model said nothing for %.0f s", silent_s)
                    child.kill()
                continue
            if message is None:
                return
            self._loop.call_soon_threadsafe(self._take, message)
