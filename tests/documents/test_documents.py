"""Every example in README and `docs/` runs as it stands, in order, against a service started as the README says.

The base model is a tiny random one under the name of the embedded one, so that what is measured are the commands.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.client import Tunery
from common.embedded.base_model import BASE_NAME
from common.embedded.ports import free_ports
from common.schemas.jobs import JobSpec
from tests.documents.blocks import Block, blocks
from tests.processes import ROOT, Process, wait_until
from tests.worker.trainer.tiny import build_base

DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("first-adapter.md", "guide.md", "operations.md", "faults.md", "benchmarks.md")),
]
# How a block is run: a program that reads it.
RUN = {"python": f"{sys.executable} -", "javascript": "node --input-type=module -"}
# A document's blocks share a shell, whose variables every program sees.
_SHELL = "set -euo pipefail\nset -a\n"


@dataclass
class Desk:
    """Where a reader sits: a folder with the examples, an environment, and the servers that were started."""

    folder: Path
    variables: dict[str, str]


def runnable(document: Path) -> list[Block]:
    return [
        block
        for block in blocks(document)
        if block.language in ("bash", *RUN) and block.why_not is None and not block.server
    ]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / ".venv").symlink_to(sys.prefix)
    base = folder / "models" / BASE_NAME
    base.mkdir(parents=True)
    build_base(base)
    variables = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "LANG": "C.UTF-8",
        "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "COLUMNS": "120",
        "TUNERY_DATA_DIR": str(folder / ".tunery"), "TUNERY_MODEL_DIR": str(base.parent),
    }  # fmt: skip
    process = Process("up", ["common.cli", "up", "--port", "0", "--workers", "1"], variables, folder / "up.log")
    try:
        process.wait_for("Tunery listens on", 120)
        url = json.loads((folder / ".tunery" / "up.json").read_text())["url"]
        variables |= {"TUNERY_URL": url, "TUNERY_API_KEY": (folder / ".tunery" / "api-key").read_text().strip()}
        with Tunery(url=url, api_key=variables["TUNERY_API_KEY"]) as client:
            wait_until(lambda: len(client.workers.list().data) >= 2, 60, "the workers")
        yield Desk(folder, variables)
    finally:
        process.end()


@pytest.fixture(scope="module")
def serving(desk: Desk) -> Iterator[str]:
    """The URL of a `tunery serve` of the base."""
    port = free_ports(1)[0]
    process = Process("serve", ["common.cli", "serve", "--base", BASE_NAME, "--port", str(port)],
                      desk.variables, desk.folder / "serve.log")  # fmt: skip
    try:
        process.wait_for("the base is loaded", 120)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.end()


def script(document: Path, block: Block) -> str:
    """Return a block as lines of a shell script that say where they come from."""
    said = f"echo '== {document.name}, line {block.line}' >&2\n"
    if block.language == "bash":
        return said + block.text
    return f"{said}{RUN[block.language]} <<'END_OF_EXAMPLE'\n{block.text}END_OF_EXAMPLE\n"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if runnable(path)], ids=lambda path: path.stem)
def test_every_example_runs(document: Path, desk: Desk, request: pytest.FixtureRequest) -> None:
    text = _SHELL + "".join(script(document, block) for block in runnable(document))
    served = "http://127.0.0.1:8001"
    if served in text:
        text = text.replace(served, request.getfixturevalue("serving"))
    if RUN["javascript"] in text:
        packages = desk.folder / "node_modules"
        packages.unlink(missing_ok=True)
        packages.symlink_to(request.getfixturevalue("node_modules"))
    done = subprocess.run(["bash", "-c", text], cwd=desk.folder, env=desk.variables, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=540)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_is_not_run_is_a_server_or_says_why(document: Path) -> None:
    for block in blocks(document):
        if block.why_not is not None:
            assert len(block.why_not) > 10, f"{document.name}, line {block.line}"
        if block.server:
            assert block.text.split("#")[0].split()[:1] in (["tunery"], [".venv/bin/tunery"])


def test_every_document_is_looked_at() -> None:
    found = {path for path in (ROOT / "docs").glob("*.md") if runnable(path)}
    assert found <= set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_bodies_are_what_the_api_takes(document: Path) -> None:
    for block in blocks(document):
        if block.language == "json" and (body := json.loads(block.text)).keys() >= {"model", "dataset"}:
            JobSpec.model_validate(body)
