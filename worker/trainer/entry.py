"""What every child process does first: take its output for the protocol, and read its spec."""

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
    """Do `work`, say its report or why there is none, and return the exit code."""
    try:
        send(Stage(stage))
        send(Result(work()))
    except BaseException as error:
        code, failure = classify(error)
        if failure is not None:
            traceback.print_exc()
            send(failure)
        return code
    return DONE


def leave_with(stage: str, work: Callable[[Sender], dict[str, Any]]) -> NoReturn:
    """Be a process that needs tokenizers only: do `work`, say the result to the parent, and exit.

    `work` is given what the parent hears it by.
    """
    die_with_parent()
    # Without torch transformers loads three times faster, in a third of the memory. None in sys.modules makes every
    # import of it fail as if it were not installed.
    sys.modules["torch"] = None  # type: ignore[assignment]
    send = claim_stdout()
    code = answer(send, stage, lambda: work(send))
    sys.stderr.flush()
    os._exit(code)
