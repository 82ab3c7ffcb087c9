"""What the fault tests share: an audited installation, and how many examples the state machine runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.judged import Judged
from tests.processes import Processes
from tests.worker.conftest import Bench, _tests_are_importable, bench, bench_database_url, context

__all__ = ["_tests_are_importable", "bench", "bench_database_url", "context"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make faults` asks for more than `make test`."""
    parser.addoption(
        "--machine-examples",
        type=int,
        default=500,
        help="examples of the state machine, half of them over each database",
    )
    parser.addoption("--saving-kills", type=int, default=60, help="kills of a trainer that saves a checkpoint")
    parser.addoption("--uploading-kills", type=int, default=10, help="kills of a worker that uploads a checkpoint")


@pytest.fixture
def judged(bench: Bench, tmp_path: Path) -> Judged:
    """An audited installation."""
    return Judged(bench, tmp_path)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Processes that do not outlive the test."""
    made = Processes(tmp_path)
    yield made
    made.end()
