"""The Dockerfiles: linted, without torch where none belongs, without root, and fed with no secret."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.commands import SERVER_ONLY

_ROOT = Path(__file__).parents[2]
_DOCKERFILES = sorted((_ROOT / "deploy").glob("Dockerfile.*"))
_EXTRAS = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture(params=_DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_its_process_is_not_root(dockerfile: Path) -> None:
    users = re.findall(r"^USER (\S+)$", dockerfile.read_text(), re.MULTILINE)
    assert users
    assert int(users[-1]) > 0


def test_what_it_copies_exists_and_is_let_through(dockerfile: Path) -> None:
    ignored = (_ROOT / ".dockerignore").read_text().splitlines()
    sources = [
        word for line in re.findall(r"^COPY (.+)$", dockerfile.read_text(), re.MULTILINE) for word in line.split()[:-1]
    ]
    assert "constraints.txt" in sources
    for source in sources:
        assert (_ROOT / source).exists(), f"{source} is not there"
        assert f"!{source}" in ignored, f".dockerignore keeps {source} back"


def test_nothing_else_is_sent_to_the_builder() -> None:
    lines = [line for line in (_ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert not {"!.env", "!.tunery", "!.git", "!."} & set(lines)


def _installed_extra(name: str) -> str:
    text = (_ROOT / "deploy" / name).read_text()
    (extra,) = re.findall(r"pip install -c constraints\.txt -e '\.\[(\w+)\]'", text)
    return extra


def test_the_api_image_has_no_torch() -> None:
    assert _installed_extra("Dockerfile.api") == "server"
    names = {re.split(r"[\[<>=~ ]", requirement)[0] for requirement in _EXTRAS["server"]}
    assert not names & set(SERVER_ONLY)


def test_the_worker_image_has_it() -> None:
    assert _installed_extra("Dockerfile.worker") == "worker"
    names = {re.split(r"[\[<>=~ ]", requirement)[0] for requirement in _EXTRAS["worker"]}
    assert set(SERVER_ONLY) <= names


def test_constraints_pin_everything_that_is_asked_for() -> None:
    lines = (_ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normal(line.partition("==")[0]) for line in lines if "==" in line}
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert "torch==2.13.0" in lines, "a local version (+cpu, +cu…) would refuse every other build"
    asked = {re.split(r"[\[<>=~ ]", item)[0] for extra in _EXTRAS.values() for item in extra}
    assert {_normal(name) for name in asked} - {"tunery"} <= pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
