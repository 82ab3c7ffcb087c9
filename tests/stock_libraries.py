"""The stock libraries as a stranger installs them: a virtual environment of their own, without this project."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
FRESH = ("peft", "transformers", "accelerate", "huggingface_hub", "safetensors", "tokenizers")
_SIGNS_OF_NO_INDEX = ("Retrying (", "Connection", "Temporary failure in name resolution")

# Run by the other environment, before anything else.
_WHERE = """
import json, sys
from importlib.util import find_spec
strangers = [name for name in ("api", "common", "tests", "worker") if find_spec(name)]
print(json.dumps([sys.prefix, strangers, {name: find_spec(name).origin for name in %r}]))
"""


@pytest.fixture(scope="session")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a second virtual environment; skips where the package index is out of reach.

    Its own, installed from the index at the versions of constraints.txt: peft, transformers, accelerate,
    huggingface_hub, safetensors, tokenizers. Shared with the environment of these tests, by a .pth file: what those
    need besides, above all torch and bitsandbytes (gigabytes), and numpy. Not there: this project. An editable
    installation is found by a .pth file of its own, and such a file counts only in the folder of an environment.
    """
    folder = tmp_path_factory.mktemp("stock") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    options = ["--no-deps", "--no-compile", "--no-cache-dir", "--quiet", "--timeout", "15", "--retries", "1"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, "-c", str(CONSTRAINTS), *FRESH]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode and any(sign in installed.stderr for sign in _SIGNS_OF_NO_INDEX):
        pytest.skip("the package index is out of reach, from which this test installs the stock libraries")
    assert installed.returncode == 0, installed.stderr
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    prefix, strangers, files = json.loads(run_stock(python, _WHERE % (FRESH,)))
    assert strangers == [] and Path(prefix) == folder
    assert all(Path(file).is_relative_to(packages) for file in files.values()), files
    return python


def run_stock(python: Path, program: str, *arguments: str) -> str:
    """Run a program in the other environment and return what it printed; neither PYTHONPATH nor a folder counts."""
    done = subprocess.run([python, "-I", "-c", program, *arguments], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
