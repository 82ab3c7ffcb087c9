"""The small resources, and uploads."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.client import Tunery
from common.errors import InvalidInput
from common.schemas.quotas import QuotaLimits
from tests.unit.client.conftest import a_job
from tests.unit.client.peer import Peer, problem, raw, says

DATASET = {
    "id": "ds_1",
    "name": "a.jsonl",
    "bytes": 9,
    "sha256": "0" * 64,
    "uri": "dataset:ds_1",
    "created_at": "2026-11-01T10:00:00Z",
}
KEY = {"id": "key_1", "name": "ci", "tenant": "default", "hint": "tnr_ab", "created_at": "2026-11-01T10:00:00Z"}
WORKER = {
    "id": "w_1",
    "name": "host-1",
    "kind": "train",
    "state": "idle",
    "device": "cuda:0",
    "device_name": "H200",
    "vram_bytes": 150,
    "base_model": None,
    "job": None,
    "heartbeat_at": "2026-11-01T10:00:00Z",
    "started_at": "2026-11-01T10:00:00Z",
}


def test_an_upload_is_sent_whole_again_after_a_refusal(peer: Peer, client: Tunery, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' * 200_000)
    peer.on("POST", "/datasets", problem(503, "infra"), says(DATASET, 201))
    told = []
    dataset = client.datasets.upload(path, on_progress=lambda *report: told.append(report))
    assert dataset.uri == "dataset:ds_1"
    assert told[-1] == ("a.jsonl", path.stat().st_size, path.stat().st_size)
    for seen in peer.requests:
        assert seen.headers["content-type"].startswith("multipart/form-data")
        assert b'name="file"; filename="a.jsonl"' in seen.body
        assert path.read_bytes() in seen.body


def test_a_file_that_cannot_be_uploaded_is_named_before_anything_is_sent(peer: Peer, client: Tunery, tmp_path: Path):
    (tmp_path / "empty.jsonl").touch()
    for path, what in [("absent.jsonl", "does not exist"), ("", "is a folder"), ("empty.jsonl", "is empty")]:
        with pytest.raises(InvalidInput, match=what):
            client.datasets.upload(tmp_path / path)
    assert peer.requests == []


def test_a_dataset_is_what_a_create_takes(peer: Peer, client: Tunery, tmp_path: Path):
    import json

    from common.schemas.lora import Lora
    from tests.unit.client.conftest import a_job

    peer.on("GET", "/datasets", says({"data": [DATASET], "has_more": False, "next": None}))
    peer.on("POST", "/jobs", says(a_job(), 201))
    client.jobs.create("base", client.datasets.list().data[0], lora=Lora(r=8))
    assert json.loads(peer.requests[1].body) == {"model": "base", "dataset": "dataset:ds_1", "lora": {"r": 8}}


def test_lists_creates_and_removals(peer: Peer, client: Tunery):
    peer.on("DELETE", "/datasets/ds_1", raw(b"", 204))
    peer.on("GET", "/base-models", says({"data": [{"id": "SmolLM2", "source": "folder", "bytes": 5, "new": 1}]}))
    peer.on("GET", "/workers", says({"data": [WORKER]}))
    peer.on("POST", "/workers/w_1/drain", says(WORKER | {"state": "draining"}))
    peer.on("POST", "/keys", says(KEY | {"key": "tnr_abc"}, 201))
    peer.on("GET", "/keys", says({"data": [KEY]}))
    peer.on("DELETE", "/keys/key_1", raw(b"", 204))
    client.datasets.delete("dataset:ds_1")
    assert client.base_models.list().data[0].id == "SmolLM2"
    assert client.workers.list().data[0].device_name == "H200"
    assert client.workers.drain("w_1").state == "draining"
    assert client.keys.create("ci", tenant="red").key == "tnr_abc"
    assert peer.requests[4].body == b'{"name":"ci","tenant":"red"}'
    assert [key.hint for key in client.keys.list()] == ["tnr_ab"]
    client.keys.revoke("key_1")


def test_quotas_and_places(peer: Peer, client: Tunery):
    import json

    quota = {"tenant": "acme", "running": 0, "queued": 0, "gpu_hours": 0.0}
    limits = {"max_running": 2, "max_queued": None, "max_gpu_hours": 1.5, "max_priority": None}
    peer.on("PUT", "/quota", says(quota | limits))
    peer.on("PATCH", "/jobs/job_1", says(a_job(status="queued", priority=5)))
    assert client.quotas.set(QuotaLimits(max_running=2, max_gpu_hours=1.5), tenant="acme").max_running == 2
    assert peer.requests[0].query == {"tenant": ["acme"]} and json.loads(peer.requests[0].body) == limits
    moment = datetime(2026, 12, 24, 2, tzinfo=UTC)
    assert client.jobs.reorder("job_1", priority=5, not_before=moment).reorder(not_before=None).priority == 5
    bodies = [json.loads(seen.body) for seen in peer.asked("PATCH", "/jobs/job_1")]
    assert bodies == [{"priority": 5, "not_before": "2026-12-24T02:00:00+00:00"}, {"not_before": None}]
