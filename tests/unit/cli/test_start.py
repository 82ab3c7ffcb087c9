"""The command starts quickly, and without what it does not need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from common.cli import failures
from common.cli.app import app
from tests.processes import ROOT

HEAVY = ("torch", "transformers", "httpx2", "pydantic_settings", "sqlalchemy", "celery", "boto3", "rich", "pydantic")
LIST_IMPORTS = f"""
import sys
from common.cli import main
sys.argv = ["tunery", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = [name for name in {HEAVY!r} if name in sys.modules]
print("HEAVY", found)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_help_imports_nothing_heavy():
    for arguments in (["--help"], ["submit", "--help"], ["workers", "--help"]):
        done = run("-c", LIST_IMPORTS, *arguments)
        assert done.returncode == 0, done.stderr
        # typer itself reads the options before a subcommand's name with pydantic.
        tolerated = ["HEAVY ['pydantic']"] if len(arguments) > 1 else []
        assert done.stdout.splitlines()[-1] in ["HEAVY []", *tolerated]


def processor_s() -> float:
    """Return the processor's time that child processes have taken so far, in seconds."""
    spent = os.times()
    return spent.children_user + spent.children_system


def test_help_answers_within_half_a_second():
    times = []
    for _ in range(3):
        began = processor_s()
        done = run("-m", "common.cli", "--help")
        times.append(processor_s() - began)
        assert done.returncode == 0
    # The processor's time, best of three: the machine that runs the tests may be busy with others.
    assert min(times) <= 0.5, times


def test_help_names_every_command():
    words = run("-m", "common.cli", "--help").stdout
    for command in (
        "up",
        "submit",
        "ls",
        "show",
        "watch",
        "cancel",
        "download",
        "demo",
        "doctor",
        "serve",
        "chat",
        "keys",
        "logs",
        "datasets",
        "models",
        "workers",
        "worker",
        "sweeper",
        "pause",
        "resume",
        "retry",
        "admin",
    ):
        assert f"\n  {command} " in words


def test_a_mistyped_command_is_guessed():
    done = run("-m", "common.cli", "sumbit")
    assert done.returncode == 2
    assert "submit" in done.stderr


def test_the_version():
    assert run("-m", "common.cli", "--version").stdout.startswith("tunery ")


def test_help_of_80_columns_cuts_nothing():
    def groups(command: Any, name: str) -> Iterator[tuple[str, str]]:
        context = typer.Context(command, info_name=name, terminal_width=78)  # what click leaves of 80
        yield name, command.get_help(context)
        for each, inner in getattr(command, "commands", {}).items():
            yield from groups(inner, f"{name} {each}")

    for name, told in groups(typer.main.get_command(app), "tunery"):
        cut = [line for line in told.splitlines() if line.endswith("...") and "Usage:" not in line]
        assert not cut, f"{name} --help: a first sentence is too long for its line: {cut}"
        options = [line for line in told.splitlines() if line.lstrip().startswith("-")]
        assert not [line for line in options if "list[" in line], f"{name} --help: an option needs a metavar"


def test_help_and_guide_tell_every_exit_code():
    told = " ".join(run("-m", "common.cli", "--help").stdout.split())
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for code in (0, failures.FAILED, failures.WRONG, failures.CANCELLED, failures.INTERRUPTED):
        assert re.search(rf"[:;] {code} ", told), f"--help does not tell exit code {code}"
        assert f"\n| {code} | " in guide, f"the guide does not tell exit code {code}"


def test_every_command_that_prints_a_result_prints_json_too():
    def commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
        for word, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{name}{word} ")
            else:
                yield name + word, command

    found = dict(commands(typer.main.get_command(app), ""))
    without = {name for name, command in found.items() if not any("-o" in option.opts for option in command.params)}
    assert without == {"up", "worker", "sweeper", "serve", "demo"}, "those run until they are stopped"


def test_bash_completes_commands():
    asked = {"_TUNERY_COMPLETE": "complete_bash", "COMP_WORDS": "tunery dat", "COMP_CWORD": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("tunery"))],
        env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["datasets"], done.stderr
