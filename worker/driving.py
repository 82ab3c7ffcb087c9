"""Lets a trainer do one run: says how long it may, hears it to the end, stops it when that is wished or it hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty

from common.settings import Settings
from worker.child import Child
from worker.heart import Heart
from worker.trainer import protocol
from worker.trainer.protocol import Failed, Idle, Message

_POLL_S = 0.2


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit code, and whether the process waits for another run.

    `unheard`: the process was gone before it took the run up.
    """

    code: int
    waits: bool = False
    unheard: bool = False


class Driver:
    """Drives the trainers of one attempt. `hear` takes what they say; `tick` is called a few times a second."""

    def __init__(self, heart: Heart, settings: Settings, hear: Callable[[Message], None], tick: Callable[[], None]):
        self._heart = heart
        self._settings = settings
        self._hear = hear
        self._tick = tick

    def drive(self, child: Child[Message], folder: Path, *, again: bool = False) -> Ended:
        """Let `child` do the run in `folder`, which it was started with, or which it is given now: `again`."""
        name = folder.name
        self._heart.on_renewed = lambda fence: child.say(do="deadline", monotonic=fence, run=name)
        if again:
            child.say(do="run", folder=str(folder), monotonic=self._heart.fence)
        else:
            child.say(do="deadline", monotonic=self._heart.fence, run=name)
            child.say(do="run")
        waits = False
        try:
            waits, heard = self._watch(child, name)
        except BaseException:
            child.kill()
            raise
        finally:
            self._heart.on_renewed = lambda fence: None
            code = protocol.DONE if waits else child.wait()
        return Ended(code, waits, unheard=not heard)

    def _watch(self, child: Child[Message], name: str) -> tuple[bool, bool]:
        """Hear the child until its run has ended; return whether it waits now, and whether it said anything."""
        stop_by: float | None = None
        heard_at, heard = time.monotonic(), False
        while True:
            try:
                message = child.messages.get(timeout=_POLL_S)
            except Empty:
                if child.ended:
                    child.kill()  # what it started, and what keeps its output open
            else:
                if message is None or isinstance(message, Idle):
                    return message is not None, heard
                self._hear(message)
                heard_at, heard = time.monotonic(), True
            now = time.monotonic()
            stop_by = self._obey(child, name, stop_by, now)
            if now - heard_at > self._settings.progress_deadline_s:
                silent = f"The trainer has said nothing for {self._settings.progress_deadline_s:.0f} s."
                self._hear(Failed("hung", silent))
                child.kill()
                heard_at, heard = now, True
            self._tick()

    def _obey(self, child: Child[Message], name: str, stop_by: float | None, now: float) -> float | None:
        """Do to the child what is wished; return the moment by which a child that was asked to stop must be gone."""
        wish = self._heart.wish
        if wish in ("cancel", "lost") or (stop_by is not None and now > stop_by):
            child.kill()
        elif wish in ("pause", "drain") and stop_by is None:
            child.say(do="stop", run=name)
            return now + self._settings.stop_grace_s
        return stop_by
