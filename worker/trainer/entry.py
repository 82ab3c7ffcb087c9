"""What every child process does first: take its output for the protocol, and read its spec."""

from __future__ import annotations

import os

from pydantic import ValidationError

from common.errors import InvalidInput
from common.schemas.jobs import JobSpec
from worker.trainer.protocol import Sender, TrainSpec


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
