"""What every child process needs: its output as the protocol's, its spec, and errors told to the parent."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from pydantic import ValidationError

from common.errors import InvalidInput
from common.schemas.jobs import JobSpec
from worker.trainer.faults import classify
from worker.trainer.lifeline import die_with_parent
from worker.trainer.protocol import DONE, Message, Result, Sender, Stage, TrainSpec


def claim_stdout() -> Sender:
    """Take standard output for the protocol; whatever else writes to it lands in the log."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Sender(pipe)


def parse_job(spec: TrainSpec) -> JobSpec:
    """Return the frozen job of `spec`, checked once more: it may have been stored by another version."""
    try:
        return JobSpec.model_validate(spec.job)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{where}: {first['msg']}", param=where, hint="submit the job again") from error


def answer(send: Callable[[Message], None], stage: str, work: Callable[[], dict[str, Any]]) -> int:
    """Announce `stage`, do `work`, send the report that it returns, and return the exit code."""

    def told() -> None:
        send(Stage(stage))
        send(Result(work()))

    return guarded(send, told)


def guarded(send: Callable[[Message], None], work: Callable[[], None]) -> int:
    """Do `work` and return the exit code. Errors become messages to the parent here, and only here."""
    try:
        work()
    except BaseException as error:
        code, failure = classify(error)
        if failure is not None:
            traceback.print_exc()
            send(failure)
        return code
    return DONE


def leave_with(stage: str, work: Callable[[Sender], dict[str, Any]]) -> NoReturn:
    """Do `work` in a process that needs tokenizers but no torch, send its result to the parent, and exit.

    `work` is given the sender that the parent listens to.
    """
    die_with_parent()
    # Without torch transformers loads three times faster, in a third of the memory. None in sys.modules makes every
    # import of it fail as if it were not installed.
    sys.modules["torch"] = None  # type: ignore[assignment]
    send = claim_stdout()
    code = answer(send, stage, lambda: work(send))
    sys.stderr.flush()
    os._exit(code)
