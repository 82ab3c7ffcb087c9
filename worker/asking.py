"""Asks a child that checks something on the CPU, within bounds of memory and time, and says how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty

from common.jobs.lifecycle import Failure
from common.settings import Settings
from worker import failures
from worker.child import Child
from worker.trainer import protocol
from worker.trainer.protocol import Failed, Message, Result

_POLL_S = 0.2
_log = logging.getLogger(__name__)


def _ignore(message: Message) -> None:
    pass


def ask(
    command: Sequence[str],
    folder: Path,
    settings: Settings,
    alive: Callable[[], None],
    timeout_s: float,
    hear: Callable[[Message], None] = _ignore,
) -> Result | Failure:
    """Run `command` as a child in `folder`; return its report, or why it says no, or how it died.

    `hear` takes what it says before that.

    Raises:
        Whatever `hear` raises, or `alive`, which is asked all the time; the child is then ended.
    """
    child = Child(command, folder, protocol.decode, address_space_bytes=settings.preflight_memory_bytes)
    try:
        answer, late = _listen(child, alive, hear, time.monotonic() + timeout_s)
    except BaseException:
        child.kill()
        raise
    finally:
        code = child.wait()
    if late:
        return Failure(
            "user_error",
            "check_too_long",
            f"dataset: the check did not end within {timeout_s:.0f} s",
            "Split the dataset.",
            "dataset",
        )
    if isinstance(answer, Failed) and code == protocol.BAD_INPUT:
        return failures.of_refusal(answer)
    if isinstance(answer, Result) and code == protocol.DONE:
        return answer
    _log.warning("%s: the check ended with %d:\n%s", folder.name, code, child.log_tail())
    return Failure(
        "crash",
        "check_died",
        f"The check of the dataset died (exit code {code}).",
        "A row may need more memory than the operator allows.",
        "dataset",
    )


def _listen(
    child: Child[Message], alive: Callable[[], None], hear: Callable[[Message], None], deadline: float
) -> tuple[Result | Failed | None, bool]:
    answer: Result | Failed | None = None
    while True:
        alive()
        if time.monotonic() > deadline:
            child.kill()
            return None, True
        try:
            message = child.messages.get(timeout=_POLL_S)
        except Empty:
            if child.ended:
                child.kill()  # what it started, and what keeps its output open
            continue
        if message is None:
            return answer, False
        if isinstance(message, Result | Failed):
            answer = message
        else:
            hear(message)
