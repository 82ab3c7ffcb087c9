"""Runs the command of a container as its image would: without the packages that the image does not install."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]

# Installed by the extra `worker` and not by `server`.
SERVER_ONLY = ("accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl")

_RUN = """
import importlib.abc, runpy, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed in this image", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = {argv!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def answers_help(command: Sequence[str], blocked: Sequence[str] = ()) -> None:
    """Run `command` up to the point where it needs servers; packages in `blocked` cannot be imported.

    A command that parses arguments shows its help; the API and the migrations, which take none, say which setting is
    missing, after all their imports.
    """
    module, arguments = _module(command)
    takes_none = module in ("api", "migrations")
    code = _RUN.format(
        blocked=set(blocked), module=module, argv=[module, *arguments, *([] if takes_none else ["--help"])]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if takes_none:
        assert (done.returncode, "TUNERY_DATABASE_URL is not set" in done.stderr) == (1, True), done.stderr
    else:
        assert (done.returncode, "usage" in done.stdout.lower()) == (0, True), done.stderr


def _module(command: Sequence[str]) -> tuple[str, list[str]]:
    if command[0] == "tunery":
        return "common.cli", list(command[1:])
    assert list(command[:2]) == ["python", "-m"], f"neither `tunery …` nor `python -m …`: {command}"
    return command[2], list(command[3:])
