"""Datasets, base models, workers, keys and quotas."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.client.peer import Peer, raw, says
from tests.unit.client.test_resources import DATASET, WORKER
from tests.unit.client.test_resources import KEY as KEY_READ


def test_datasets(peer: Peer, tunery, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    peer.on("POST", "/datasets", says(DATASET, 201))
    peer.on("GET", "/datasets", says({"data": [DATASET], "has_more": False, "next": None}))
    peer.on("DELETE", "/datasets/ds_1", raw(b"", 204))
    assert "dataset:ds_1" in tunery("datasets", "upload", "a.jsonl").stdout
    assert "dataset:ds_1" in tunery("datasets", "list").stdout
    assert tunery("datasets", "rm", "dataset:ds_1").stdout == "removed: dataset:ds_1\n"
    assert json.loads(tunery("datasets", "list", "-o", "json").stdout)["data"][0]["name"] == "a.jsonl"


def test_models_and_workers(peer: Peer, tunery):
    peer.on("GET", "/base-models", says({"data": [{"id": "SmolLM2", "source": "folder", "bytes": 5}]}))
    peer.on("GET", "/workers", says({"data": [WORKER]}))
    peer.on("POST", "/workers/w_1/drain", says(WORKER | {"state": "draining"}))
    assert "SmolLM2" in tunery("models").stdout
    assert "H200" in tunery("workers").stdout
    assert json.loads(tunery("workers", "-o", "json").stdout) == json.loads(
        tunery("-o", "json", "workers", "list").stdout
    )
    assert tunery("workers", "drain", "w_1").stdout == "w_1: draining\n"


def test_keys(peer: Peer, tunery):
    peer.on("POST", "/keys", says(KEY_READ | {"key": "tnr_new"}, 201))
    peer.on("GET", "/keys", says({"data": [KEY_READ]}))
    peer.on("DELETE", "/keys/key_1", raw(b"", 204))
    made = tunery("keys", "create", "ci")
    assert "tnr_new" in made.stdout and "not shown again" in made.stderr
    assert json.loads(peer.requests[0].body) == {"name": "ci"}
    assert "never" in tunery("keys", "list").stdout
    assert tunery("keys", "revoke", "key_1").stdout == "revoked: key_1\n"


def test_quota(peer: Peer, tunery):
    quota = {"tenant": "acme", "max_running": 2, "max_queued": None, "max_gpu_hours": 100.0, "max_priority": None}
    peer.on("GET", "/quota", says(quota | {"running": 1, "queued": 4, "gpu_hours": 12.5}))
    out = tunery("quota", "--tenant", "acme").stdout
    assert "1 of 2" in out and "4 of any number" in out and "12.5 of 100" in out
    assert peer.requests[0].query == {"tenant": ["acme"]}
