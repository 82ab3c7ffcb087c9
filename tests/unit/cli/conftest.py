"""The command line in this process, with a real HTTP peer as its server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from common.cli.app import app
from tests.unit.client.peer import Peer

KEY = "tnr_secret"
Tunery = Callable[..., Result]


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def tunery(peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tunery:
    """Return a function that runs `tunery` with arguments, in an empty folder, against the peer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNERY_DATA_DIR", raising=False)
    monkeypatch.setenv("TUNERY_URL", peer.url)
    monkeypatch.setenv("TUNERY_API_KEY", KEY)
    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments])
