"""The commands that a newcomer types: each is there, says what it does, and sets up what it needs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_TARGETS = ("setup", "demo", "test", "faults", "lint", "bench", "help")


def _make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=_ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_says_what_each_target_does() -> None:
    lines = _make("help").splitlines()
    assert [line.split()[1] for line in lines] == list(_TARGETS)
    assert all(len(line.split()) > 4 for line in lines)
    assert _make() == _make("help")


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench"])
def test_targets_install_first(target: str) -> None:
    steps = _make("-n", "-W", "pyproject.toml", target)
    assert "-c constraints.txt -e '.[server,worker,embedded,dev]'" in steps
    assert steps.index("pip install") < steps.index(
        {"demo": "tunery demo", "test": "-m pytest", "lint": "ruff check", "bench": "benchmarks/"}[target]
    )


def test_an_old_python_is_refused_in_words() -> None:
    done = subprocess.run(
        ["make", "-W", "pyproject.toml", "PYTHON=", "setup"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Tunery needs Python 3.11 or newer" in done.stderr


def test_continuous_integration_runs_the_test_command_and_ends_with_pytest() -> None:
    script = _ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make --no-print-directory test </dev/null$", script.read_text(), re.MULTILINE)
    last = [line for line in _make("-n", "test").splitlines() if line.strip()][-1]
    assert "-m pytest" in last
