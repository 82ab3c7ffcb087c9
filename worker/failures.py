"""What went wrong, as a job's record says it: one place for both kinds of workers."""

from __future__ import annotations

from common.errors import InfraError, UserError
from common.jobs.lifecycle import Failure
from worker.trainer import protocol

# A card or a disk may be mended, or another worker's be better; a job that breaks each of them must end nevertheless.
# A quarter of an hour and the time of the attempts.
_MACHINE_ATTEMPTS = 20
_KINDS = {protocol.OUT_OF_MEMORY: "oom", protocol.DISK_FULL: "infra", protocol.DEVICE_FAULT: "device"}


def of_user(error: UserError) -> Failure:
    """Return the failure that only the user can mend."""
    return Failure("user_error", error.code, error.message, error.hint, error.param)


def of_refusal(said: protocol.Failed) -> Failure:
    """Return the failure that a child has told, and that only the user can mend."""
    rows = (said.problems, said.num_problems)
    return Failure("user_error", said.code, said.message, said.hint, said.param, None, *rows)


def of_infrastructure(error: InfraError) -> Failure:
    """Return the failure of a part that may be back at the next attempt."""
    return Failure("infra", error.code, f"{error.message}.", error.hint, error.param, error.attempts)


def of_disk(code: str, message: str) -> Failure:
    """Return the failure of a worker's disk."""
    return Failure("infra", code, message, attempts=_MACHINE_ATTEMPTS)


def kind_of_exit(code: int) -> tuple[str, int | None]:
    """Return what an exit code of the trainer means as a fault, and at which one in a row it ends the job."""
    kind = _KINDS.get(code, "crash")
    return kind, _MACHINE_ATTEMPTS if kind in ("infra", "device") else None
