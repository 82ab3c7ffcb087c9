"""`python -m tests.faults.crashing POINT MODULE ARGUMENT…`: run a module that kills itself at one point.

POINT is `WHEN MODULE:NAME [N]`, in one argument: at the Nth call (1 if left out) of that function, `before` it runs,
`after` it has returned (for a verb of lifecycle: not committed yet), or when what it wrote is `committed`. With
`freeze-before` and `freeze-after` it stops itself instead, until somebody sends SIGCONT. The product has no hook for
this: the function is wrapped in this process before the module runs.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import event


def main(point: str, module: str, arguments: list[str]) -> None:
    """Arm `point` and become `module`."""
    when, where, *number = point.split()
    place, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(place))
    calls = itertools.count(1)
    setattr(owner, name, _armed(when, int(number[0]) if number else 1, getattr(owner, name), calls))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _armed(when: str, number: int, real: Callable[..., Any], calls: itertools.count[int]) -> Callable[..., Any]:
    @functools.wraps(real)
    def armed(*arguments: Any, **options: Any) -> Any:
        now = next(calls) == number
        if now and when in ("before", "freeze-before"):
            _leave(when)
        if now and when == "committed":
            event.listen(arguments[0], "after_commit", lambda session: _leave(when))
        result = real(*arguments, **options)
        if now and when in ("after", "freeze-after"):
            _leave(when)
        return result

    return armed


def _leave(when: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP if when.startswith("freeze") else signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
