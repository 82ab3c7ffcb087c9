"""Whatever is sent, it is refused before a GPU is asked for, in words that say where and what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.trainer import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model folder with a ChatML template."""
    return tiny.build_base(tmp_path_factory.mktemp("base"))
