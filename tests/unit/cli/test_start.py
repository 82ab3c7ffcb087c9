"""The command starts quickly, and without what it does not need."""

from __future__ import annotations

import os
import subprocess
import sys

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
