"""The stock `openai` package for Node, as npm installs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent / "e2e" / "node" / "package.json"


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `node_modules` with the package in it; skips where there is no Node."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no Node with npm on this machine; this test drives the stock `openai` package for Node")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(_PACKAGE, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert installed.returncode == 0, installed.stderr
    return folder / "node_modules"
