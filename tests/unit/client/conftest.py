"""A peer for each test, and a client that points at it and does not wait between attempts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from common.client import Retries, Tunery
from tests.unit.client.peer import Peer

KEY = "tnr_secret"
QUICK = Retries(limit=4, first_s=0.001, longest_s=0.002, obeyed_s=5)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def client(peer: Peer) -> Iterator[Tunery]:
    with Tunery(peer.url, KEY, retries=QUICK) as client:
        yield client


def a_job(**changes: Any) -> dict[str, Any]:
    """Return a job as the API shows it."""
    job: dict[str, Any] = {
        "id": "job_1",
        "status": "running",
        "stage": "train",
        "step": 3,
        "max_steps": 10,
        "loss": 1.5,
        "tokens_per_s": 250.0,
        "eta_s": 14.0,
        "model": "base",
        "base_revision": None,
        "dataset": "dataset:ds_1",
        "validation_dataset": None,
        "method": "qlora",
        "suffix": None,
        "hyperparameters": {"learning_rate": 1e-4},
        "lora": {},
        "quantization": {},
        "seed": 42,
        "priority": 0,
        "metadata": {"team": "red"},
        "export": ["adapter"],
        "desired": "run",
        "attempt": 1,
        "worker": "w1",
        "error": None,
        "report": None,
        "created_at": "2026-11-01T10:00:00Z",
        "queued_at": "2026-11-01T10:00:01Z",
        "started_at": "2026-11-01T10:00:02Z",
        "finished_at": None,
    }
    return job | changes


def an_event(number: int, name: str = "job.claimed") -> dict[str, Any]:
    return {"id": number, "at": "2026-11-01T10:00:00Z", "name": name, "level": "info", "message": name, "data": {}}


def a_metric(number: int, step: int, kind: str = "train", **values: float) -> dict[str, Any]:
    return {"id": number, "at": "2026-11-01T10:00:00Z", "step": step, "kind": kind, "values": values}
