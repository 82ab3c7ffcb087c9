"""The rules of the house that no linter knows, each checked on the source itself."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "common", "migrations", "worker")


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Yield each module of the product as (path, syntax tree)."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def test_imports_go_one_way():
    outcome = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout


# An HTTP status is not a job's: these keep the status of an answer.
HTTP_ONLY = {"api/edge.py", "common/client/errors.py", "common/client/fetching.py"}


def _writes_status(node: ast.AST) -> bool:
    """Whether `node` sets something's status: as an attribute, or as a value of an insert or update."""
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Attribute) and target.attr == "status" for target in targets)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "values":
        return any(word.arg == "status" for word in node.keywords)
    return False


def test_only_lifecycle_writes_status():
    writers = {path for path, tree in sources() if any(_writes_status(node) for node in ast.walk(tree))}
    assert {path.rpartition("/")[0] for path in writers - HTTP_ONLY} == {"common/jobs/lifecycle"}


def test_only_lifecycle_updates_jobs():
    pattern = re.compile(r"\bupdate\((jobs|JobRow|JobRow\.__table__)\)")
    writers = {path for path, _ in sources() if pattern.search((ROOT / path).read_text())}
    assert {path.rpartition("/")[0] for path in writers} == {"common/jobs/lifecycle"}


def test_only_settings_reads_the_environment():
    pattern = re.compile(r"\bos\.(environ|getenv|environb)\b")
    readers = {path for path, _ in sources() if pattern.search((ROOT / path).read_text())}
    # The slate puts the whole environment back between two runs, and reads nothing out of it.
    assert readers - {"worker/trainer/slate.py"} == {"common/settings.py"}


# What runs in child processes.
CHILDREN = ("worker/trainer/", "worker/ml/", "worker/data/", "worker/serve/engine/")


def test_the_supervisors_side_knows_of_the_trainer_only_its_protocol():
    for path, tree in sources():
        if not path.startswith("worker/") or path.startswith(CHILDREN):
            continue
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        names += [f"{node.module}.{item.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                  for item in node.names if node.module == "worker.trainer"]  # fmt: skip
        used = {name for name in names if name.startswith("worker.trainer.")}
        assert used <= {"worker.trainer.protocol", "worker.trainer.protocol.MANIFEST_FILE"}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_why_it_exists(package: str):
    silent = [path for path, tree in sources() if path.startswith(f"{package}/") and not ast.get_docstring(tree)
              and "versions" not in path]  # fmt: skip
    assert silent == []


@pytest.mark.parametrize("package", ["api", "common", "worker"])
def test_no_vague_module_names(package: str):
    vague = {"utils", "util", "helpers", "helper", "misc", "common_utils", "manager", "handlers"}
    assert not [path for path, _ in sources() if path.startswith(f"{package}/") and Path(path).stem in vague]


def test_settings_are_described():
    settings = importlib.import_module("common.settings").Settings
    assert not [name for name, field in settings.model_fields.items() if not field.description]


def test_no_module_is_broken():
    """Each module of the parts without torch can be imported."""
    for package in ("api", "common"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
