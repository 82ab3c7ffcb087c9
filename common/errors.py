"""The one error tree.

TuneryError
├── UserError            the caller can mend it; the message says how
│   ├── InvalidInput     a field, row or URI is wrong
│   │   └── BadRows      rows of a dataset are wrong, each told by its number
│   ├── Unauthenticated  no key, or one that is not known
│   ├── Forbidden        the key may not do this
│   ├── NotFound         no such thing in this tenant
│   ├── WrongState       the job cannot do that now
│   ├── TooLarge         more bytes than the operator allows
│   └── OverQuota        more jobs or uploads than the operator allows the tenant; later it may pass
├── InfraError           a part of the installation is away; the same call may pass later
│   ├── SourceAway       where the user's data lie does not answer: not waited for without an end
│   ├── SourceSlow       it answers too slowly: tried thrice, since it holds a worker each time
│   └── SourceRefused    it answers, and refuses: a few tries, in case that it means something else
└── LeaseLost            this attempt no longer owns its job: stop and write nothing

Only the edges give an error another form: `api/errors.py` knows HTTP, the CLI knows exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TuneryError(Exception):
    """Base of every error that Tunery raises on purpose.

    Args:
        message: what is wrong, naming the field or row.
        code: a stable word for programs.
        param: dotted path of the field that is wrong, if there is one.
        hint: what to do about it.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.hint = hint


class UserError(TuneryError):
    """The caller can mend it."""

    code = "user_error"


class InvalidInput(UserError):
    """A field, row or URI is wrong."""

    code = "invalid_input"


@dataclass(frozen=True)
class JobProblem:
    """What is wrong with one row of the file that the job's field `param` names.

    `row` counts from 1; in JSONL it is the line, blank ones counted. `field` is the column or turn, where one is to
    blame, e.g. `messages[1].content`; `code` a word for programs.
    """

    param: str
    row: int
    field: str | None
    code: str
    message: str
    hint: str | None = None

    @property
    def line(self) -> str:
        """The problem as one line of text."""
        return f"{self.param}: row {self.row}: {self.message}"


class BadRows(InvalidInput):
    """Rows of a dataset are wrong: the first of them in `problems`, how many there are in `num_problems`."""

    def __init__(self, message: str, problems: Sequence[JobProblem], num_problems: int, *, code: str = "bad_rows"):
        super().__init__(message, code=code, param=problems[0].param, hint=problems[0].hint)
        self.problems = problems
        self.num_problems = num_problems


class Unauthenticated(UserError):
    """No API key, or one that is not known."""

    code = "unauthenticated"


class Forbidden(UserError):
    """The key is known, but may not do this."""

    code = "forbidden"


class NotFound(UserError):
    """No such thing in this tenant."""

    code = "not_found"


class WrongState(UserError):
    """The job cannot do that in its present state."""

    code = "wrong_state"


class TooLarge(UserError):
    """More bytes, rows or tokens than the operator allows."""

    code = "too_large"


class OverQuota(UserError):
    """More jobs or uploads than the operator allows this tenant. The same call may pass later."""

    code = "over_quota"


class InfraError(TuneryError):
    """A part of the installation (database, broker, object store, hub) is away or full.

    `attempts`: at which meeting in a row it ends a job; None where a job waits for as long as it takes.
    """

    code = "infra"
    attempts: int | None = None


class SourceAway(InfraError):
    """Where the user said that the data lie does not answer."""

    code = "source_away"
    # Three hours, with the longest pause of a minute.
    attempts = 200


class SourceSlow(InfraError):
    """Where the user said that the data lie answers, but more slowly than a worker waits for."""

    code = "source_slow"
    attempts = 3


class SourceRefused(InfraError):
    """Where the user said that the data lie refuses them."""

    code = "source_refused"
    attempts = 5


class LeaseLost(TuneryError):
    """The attempt's lease ended or another attempt owns the job: nothing may be written any more."""

    code = "lease_lost"


def no_job(message: str = "there is no such job") -> NotFound:
    """Return the error for a job that the tenant has not."""
    hint = "`tunery ls` (GET /jobs) lists the jobs of your key's tenant."
    return NotFound(message, param="id", hint=hint)
