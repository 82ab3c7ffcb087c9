"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    check: str
    verdict: Verdict
    detail: str
    hint: str | None = None


def guarded(check: str, hint: str, look: Callable[[], Finding]) -> Finding:
    """Return what `look` finds; whatever it raises is a finding too, with `hint`."""
    try:
        return look()
    except ModuleNotFoundError as error:
        return Finding(check, "fail", f"the package {error.name} is not installed", "pip install 'tunery[server]'")
    # A broken part of the installation raises what its library likes: none of that may end the report.
    except Exception as error:
        reason = str(getattr(error, "message", error)).strip().splitlines() or [type(error).__name__]
        return Finding(check, "fail", reason[0], getattr(error, "hint", None) or hint)
