"""How bytes on their way are shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from common.cli import screen, transfers


@pytest.mark.parametrize("width", [80, 140])
def test_each_file_has_one_line_with_its_numbers(width: int, monkeypatch: pytest.MonkeyPatch):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, markup=False)
    monkeypatch.setattr(screen, "stderr", lambda: console)
    names = ("adapter/README.md", "adapter/adapter_model.safetensors", f"merged/{'long' * 30}/model.safetensors")
    with transfers.transfer("downloading", False) as report:
        assert report is not None
        for name in names:
            report(name, 955_000_000, 955_900_000)
            report(name, 955_900_000, 955_900_000)
    lines = [line for line in console.file.getvalue().split("\x1b[?25h")[0].splitlines() if "downloading" in line]
    for name, line in zip(names, lines[-3:], strict=True):
        assert name[-12:] in line and "955.9/955.9 MB" in line


def test_nobody_is_shown_a_bar_who_does_not_look():
    with transfers.transfer("downloading", True) as report:
        assert report is None
