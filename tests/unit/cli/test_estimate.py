"""`tunery estimate`, and what `tunery show` says of memory."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from common.cli.estimate import estimate
from common.cli.submit import submit
from common.client import AsyncTunery
from tests.unit.cli.conftest import KEY
from tests.unit.client.conftest import a_job
from tests.unit.client.peer import Peer, says
from tests.unit.client.test_resources import DATASET

PARTS = {"weights": 5_700_000_000, "activations": 1_700_000_000, "adapter": 27_000_000}
MEMORY = {
    "device": "NVIDIA H100",
    "rows": 4,
    "length": 948,
    "checkpointed_layers": 32,
    "parts": PARTS,
    "paged_bytes": 0,
    "allocated_bytes": 7_427_000_000,
    "total_bytes": 8_027_000_000,
}
TOKENS = {"source": "sampled", "rows": 600, "tokens": 60_000, "low": 40_000, "high": 90_000}
WORKER: dict[str, Any] = {"id": "w", "name": "big", "state": "idle", "device_name": "NVIDIA H100"}
WORKER |= {"vram_bytes": 80 << 30, "fits": True, "total_bytes": 8_027_000_000, "duration_s": 754.0}
ANSWER: dict[str, Any] = {
    "tokens": TOKENS | {"longest_row_tokens": 948, "train_tokens": 180_000},
    "steps": 114,
    "memory": MEMORY,
    "workers": [WORKER, WORKER | {"name": "small", "fits": False, "duration_s": None, "message": "the card has 4.0"}],
    "position": 3,
    "unknown": {},
}


def test_it_takes_what_submit_takes():
    own = {"clone", "watching", "quiet"}
    assert set(inspect.signature(estimate).parameters) == set(inspect.signature(submit).parameters) - own


def test_it_shows_what_a_job_would_take(peer: Peer, tunery, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    peer.on("POST", "/datasets", says(DATASET, 201))
    peer.on("POST", "/jobs/estimate", says(ANSWER))
    done = tunery("estimate", "train.jsonl", "-m", "base", "--set", "num_train_epochs=3", "--priority", "2")
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    for told in ("60,000 in 600 rows", "40,000 to 90,000", "180,000", "114", "weights 5.7 GB", "H100", "12:34", "no"):
        assert told in words, told
    assert "adapter" not in words, "a part of no weight"
    assert json.loads(peer.asked("POST", "/jobs/estimate")[0].body) == {
        "model": "base",
        "dataset": "dataset:ds_1",
        "priority": 2,
        "hyperparameters": {"num_train_epochs": 3.0},
    }
    assert not peer.asked("POST", "/jobs"), "no job is made"


def test_what_is_not_known_is_said(peer: Peer, tunery):
    unknown = {"tokens": "only uploads", "steps": "only uploads", "memory": "no sizes", "workers": "none is connected"}
    none = dict.fromkeys(("tokens", "steps", "memory"), None)
    peer.on("POST", "/jobs/estimate", says(ANSWER | none | {"workers": [], "unknown": unknown}))
    done = tunery("estimate", "hf://org/data", "-m", "org/base")
    assert done.exit_code == 0, done.output
    assert all(f"not known: {why}" in done.stdout for why in unknown.values())
    assert tunery("estimate", "hf://org/data").exit_code == 2


def test_as_json(peer: Peer, tunery):
    peer.on("POST", "/jobs/estimate", says(ANSWER))
    found = json.loads(tunery("estimate", "hf://org/data", "-m", "org/base", "-o", "json").stdout)
    assert found["memory"]["parts"] == PARTS and found["workers"][1]["fits"] is False


def test_the_async_client_asks_the_same(peer: Peer):
    peer.on("POST", "/jobs/estimate", says(ANSWER))

    async def ask() -> None:
        async with AsyncTunery(peer.url, KEY) as client:
            found = await client.jobs.estimate("base", "hf://org/data", lora={"r": 8})
            assert found.steps == 114 and found.memory and found.memory.parts == PARTS

    anyio.run(ask)
    assert json.loads(peer.requests[0].body) == {"model": "base", "dataset": "hf://org/data", "lora": {"r": 8}}


@pytest.mark.parametrize("measured", [None, 8_100_000_000])
def test_show_tells_memory(peer: Peer, tunery, measured: int | None):
    memory = {"estimated": {"parts": PARTS}, "estimated_bytes": 7_427_000_000}
    report = {"memory": memory | ({"measured_bytes": measured} if measured else {})}
    peer.on("GET", "/jobs/job_1", says(a_job(status="succeeded", report=report)))
    words = " ".join(tunery("show", "job_1").stdout.split())
    assert "7.4 GB estimated" in words and "weights 5.7 GB, activations 1.7 GB" in words
    assert ("8.1 GB measured" in words) is bool(measured)
