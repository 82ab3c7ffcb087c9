"""What a job would take is told before it is submitted, and nothing is created."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr
from sqlalchemy import func, select

from benchmarks.shapes import LLAMA3_8B
from common import estimates, workers
from common.db.rows import Base, JobRow
from common.jobs import lifecycle, queries
from common.jobs.lifecycle import Failure
from common.memory.shape import read_shape
from common.schemas.jobs import JobSpec
from common.workers import Beat
from tests.api.conftest import BASE, Api
from tests.api.test_queue import queued
from tests.worker.peers import REVISION, Hub, serve

GIB = 2**30
# More than the API reads of a configuration.
LONG = json.dumps({"padding": "x" * 2**21}).encode()
LLAMA = LLAMA3_8B | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "word " * 40},
            {"role": "assistant", "content": "answer " * (20 + number % 9)},
        ]
    }
    for number in range(600)
]


def write_base(api: Api) -> None:
    folder = api.context.settings.model_dir
    assert folder is not None
    (folder / BASE / "config.json").write_text(json.dumps(LLAMA))


def upload(client: httpx2.Client, rows: list[dict[str, Any]] | None = None) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows or ROWS)
    answer = client.post("/datasets", files={"file": ("train.jsonl", text.encode())})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["uri"])


def beat(api: Api, name: str, card: str | None = None, gib: float = 0, free_gib: float | None = None) -> None:
    vram, free = int(gib * GIB) if card else None, None if free_gib is None else int(free_gib * GIB)
    report = Beat(name, name, "train", "cuda:0" if card else "cpu", card, vram, "idle", free_bytes=free)
    with api.context.write() as session:
        workers.beat(session, report)


def counts(api: Api) -> dict[str, int]:
    with api.context.read() as session:
        return {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }


def estimate(client: httpx2.Client, dataset: str, **changes: Any) -> dict[str, Any]:
    answer = client.post("/jobs/estimate", json={"model": BASE, "dataset": dataset} | changes)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_it_tells_what_a_job_would_take_and_creates_nothing(any_api: Api) -> None:
    write_base(any_api)
    with any_api.client() as client:
        dataset = upload(client)
        for name, card, gib in (("large", "NVIDIA H100", 80), ("small", "NVIDIA GTX", 4), ("slow", None, 0)):
            beat(any_api, name, card, gib)
        before = counts(any_api)
        found = estimate(client, dataset)
        assert counts(any_api) == before, "an estimate creates nothing"

    tokens = found["tokens"]
    assert tokens["source"] == "sampled" and tokens["rows"] == 600
    assert tokens["low"] < tokens["tokens"] < tokens["high"]
    assert tokens["train_tokens"] == tokens["tokens"] and found["steps"] == 38
    memory = found["memory"]
    assert memory["device"] == "NVIDIA H100" and memory["checkpointed_layers"] == 32 and memory["rows"] == 16
    assert sum(memory["parts"].values()) == memory["total_bytes"]
    # Weights in 4 bit, 16-bit embeddings and head.
    assert memory["parts"]["weights"] == pytest.approx(5.70e9, rel=0.01)
    fits = {worker["name"]: worker["fits"] for worker in found["workers"]}
    assert fits == {"large": True, "small": False, "slow": None}
    small = next(worker for worker in found["workers"] if worker["name"] == "small")
    assert "GiB are needed, and the card has 4.0" in small["message"]
    assert found["position"] == 1


def test_what_others_hold_of_a_card_does_not_count(api: Api, client: httpx2.Client) -> None:
    write_base(api)
    beat(api, "crowded", "NVIDIA H200", 140, free_gib=4)
    beat(api, "full", "NVIDIA H200", 140, free_gib=0)
    beat(api, "own", "NVIDIA L40S", 44, free_gib=43.5)
    found = estimate(client, upload(client))
    told = {worker["name"]: worker for worker in found["workers"]}
    assert {name: worker["fits"] for name, worker in told.items()} == {"crowded": False, "full": False, "own": True}
    assert "and the card has 140.0, of which 4.0 are free" in told["crowded"]["message"]
    assert told["crowded"]["free_bytes"] == 4 * GIB and found["memory"]["device"] == "NVIDIA L40S"
    assert {one["id"]: one["free_bytes"] for one in client.get("/workers").json()["data"]}["full"] == 0


def test_auto_is_told_for_each_card(api: Api, client: httpx2.Client) -> None:
    write_base(api)
    beat(api, "large", "NVIDIA H200", 140)
    beat(api, "small", "NVIDIA L4", 9)
    options = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    found = estimate(client, upload(client), hyperparameters=dict.fromkeys(options, "auto") | {"max_length": 2048})
    told = {worker["name"]: worker for worker in found["workers"]}
    assert told["large"]["fits"] and told["small"]["fits"]
    for worker in told.values():
        assert worker[options[0]] * worker[options[1]] == 16
    assert told["large"]["gradient_checkpointing"] == 0 != told["small"]["gradient_checkpointing"]
    assert told["large"]["total_bytes"] > told["small"]["total_bytes"]


def test_what_a_check_has_counted_is_taken(any_api: Api) -> None:
    write_base(any_api)
    report = {"rows": 600, "tokens": 33_333, "max_length": 1024, "longest_row_tokens": 61}
    with any_api.client() as client:
        dataset = upload(client)
        answer = client.post("/jobs", json={"model": BASE, "dataset": dataset}).json()
        with any_api.context.write() as session:
            check = lifecycle.claim_preflight(session, "p", 60)
            assert check is not None
            lifecycle.accept(
                session, check, base_id="org/tiny-base", base_revision=None, dataset_sha256="0" * 64, report=report
            )
        found = estimate(client, dataset, hyperparameters={"num_train_epochs": 3.0})
        assert found["tokens"]["source"] == "counted" and found["tokens"]["job"] == answer["id"]
        assert found["tokens"]["tokens"] == 33_333 == found["tokens"]["low"] == found["tokens"]["high"]
        assert found["tokens"]["train_tokens"] == 3 * 33_333 and found["steps"] == 3 * 38
        assert found["memory"]["length"] == 61
        assert found["position"] == 2, "the other job comes before it"
        # Another cut makes other tokens, and another tenant sees nothing of it.
        assert estimate(client, dataset, hyperparameters={"max_length": 16})["tokens"]["source"] == "sampled"


def test_jobs_that_failed_their_check_do_not_stand_in_the_way(any_api: Api) -> None:
    write_base(any_api)
    checked = {"rows": 600, "tokens": 33_333, "max_length": 1024, "longest_row_tokens": 61}
    pinned = {"base_id": "org/tiny-base", "base_revision": None, "dataset_sha256": "0" * 64}
    with any_api.client() as client:
        dataset = upload(client)
        for seed, passes in ((1, True), (2, False)):
            client.post("/jobs", json={"model": BASE, "dataset": dataset, "seed": seed}).raise_for_status()
            with any_api.context.write() as session:
                check = lifecycle.claim_preflight(session, "p", 60)
                assert check is not None
                if passes:
                    lifecycle.accept(session, check, **pinned, report=checked)  # type: ignore[arg-type]
                else:
                    lifecycle.reject(session, check, Failure("user_error", "bad_module", "no such module"))
        with any_api.context.read() as session:
            assert session.scalar(select(func.count()).where(JobRow.preflight.is_not(None))) == 1
        assert estimate(client, dataset)["tokens"]["tokens"] == 33_333


def test_time_comes_from_jobs_on_such_a_card(any_api: Api) -> None:
    write_base(any_api)
    beat(any_api, "known", "NVIDIA H100", 80)
    beat(any_api, "other", "NVIDIA L40S", 48)
    with any_api.client() as client:
        dataset = upload(client)
        for rate in (1000.0, 9000.0, 3000.0):
            succeed(any_api, client, {"device": "NVIDIA H100", "tokens_per_s": rate, "train_s": 1e9})
        # Of another method.
        succeed(any_api, client, {"device": "NVIDIA L40S", "tokens_per_s": 5.0, "train_s": 1.0}, method="lora")
        found = estimate(client, dataset)
        told = {worker["name"]: worker for worker in found["workers"]}
        assert told["known"]["tokens_per_s"] == 3000.0, "the median"
        assert told["known"]["duration_s"] == pytest.approx(found["tokens"]["train_tokens"] / 3000, abs=0.1)
        assert told["other"]["duration_s"] is None and "not known" in told["other"]["message"]
        lora = {worker["name"]: worker for worker in estimate(client, dataset, method="lora")["workers"]}
        assert lora["known"]["duration_s"] is None and lora["other"]["tokens_per_s"] == 5.0


def succeed(api: Api, client: httpx2.Client, report: dict[str, Any], **changes: Any) -> None:
    """Submit a job and let it succeed with `report`."""
    answer = client.post("/jobs", json={"model": BASE, "dataset": "https://example.com/a.jsonl"} | changes)
    assert answer.status_code == 201, answer.text
    with api.context.write() as session:
        check = lifecycle.claim_preflight(session, "p", 60)
        assert check is not None
        lifecycle.accept(
            session, check, base_id="org/tiny-base", base_revision=None, dataset_sha256="0" * 64, report={}
        )
    with api.context.write() as session:
        claim = lifecycle.claim(session, "w", 60)
        assert claim is not None
        artifact = {"name": "manifest.json", "key": "key", "bytes": 2, "sha256": "0" * 64}
        lifecycle.publish(session, claim, lifecycle.Published("key", "0" * 64, [artifact]), report)


def test_what_cannot_be_told_is_said(api: Api, client: httpx2.Client) -> None:
    found = estimate(client, "https://example.com/train.jsonl")
    assert found["tokens"] is found["steps"] is found["memory"] is None and found["workers"] == []
    assert set(found["unknown"]) == {"tokens", "steps", "memory", "workers"}
    assert "config.json" in found["unknown"]["memory"] and "uploaded" in found["unknown"]["tokens"]
    steps = estimate(client, "https://example.com/train.jsonl", hyperparameters={"max_steps": 7})
    assert steps["steps"] == 7 and "steps" not in steps["unknown"]


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": "absent"}, "model", "base_not_found"),
        ({"dataset": "dataset:ds_0"}, "dataset", "dataset_not_found"),
        ({"dataset": "s3://other/train.jsonl"}, "dataset", None),
        ({"lora": {"r": 0}}, "lora.r", None),
        ({"nonsense": 1}, "nonsense", None),
        ({"hyperparameters": {"max_length": 9000}}, "hyperparameters.max_length", "max_length_beyond_context"),
    ],
)
def test_what_cannot_be_submitted_cannot_be_estimated(
    api: Api, client: httpx2.Client, changes: dict[str, Any], param: str, code: str | None
) -> None:
    write_base(api)
    body = {"model": BASE, "dataset": "https://example.com/train.jsonl"} | changes
    answer = client.post("/jobs/estimate", json=body)
    assert answer.status_code in (400, 422) and answer.json()["param"] == param, answer.text
    assert code is None or answer.json()["code"] == code
    if code != "max_length_beyond_context":  # the check finds that
        submitted = client.post("/jobs", json=body)
        assert (submitted.status_code, submitted.json()["code"]) == (answer.status_code, answer.json()["code"])


@pytest.fixture
def hub_api(start: Any, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API whose hub is a peer on loopback with one model, for which it wants the operator's token."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    files = {"config.json": json.dumps(LLAMA).encode()}
    models = {"org/base": files, "org/bare": {}, "org/long": {"config.json": LONG}}
    with serve(Hub(models, {}, "hub-token")) as server:
        yield start(sqlite_url, hf_endpoint=f"http://127.0.0.1:{server.server_port}", hf_token=SecretStr("hub-token"))


def test_the_hub_is_asked_for_the_sizes_of_a_model(hub_api: Api) -> None:
    with hub_api.client() as client:
        dataset = upload(client)
        for model in ("org/base", f"org/base@{REVISION}"):
            found = estimate(client, dataset, model=model)
            assert found["memory"]["parts"]["weights"] == pytest.approx(5.70e9, rel=0.01)
            assert "24 GiB" in found["memory"]["device"]
        for model, told in (
            ("org/absent", "is not on the hub"),
            ("org/bare", "has no config.json"),
            ("org/long", "does not say its sizes"),
        ):
            found = estimate(client, dataset, model=model)
            assert found["memory"] is None and told in found["unknown"]["memory"], model


def test_sizes_that_a_check_has_found_need_no_hub(api: Api, client: httpx2.Client) -> None:
    shape = read_shape(LLAMA)
    assert shape is not None
    dataset = upload(client)
    away = estimate(client, dataset, model="org/base")
    assert away["memory"] is None and "org/base" in away["unknown"]["memory"]
    job = client.post("/jobs", json={"model": "org/base", "dataset": dataset}).json()["id"]
    with api.context.write() as session:
        check = lifecycle.claim_preflight(session, "p", 60)
        assert check is not None and check.job_id == job
        report = {"shape": shape.as_dict()}
        lifecycle.accept(session, check, base_id="b", base_revision=None, dataset_sha256="0" * 64, report=report)
    assert estimate(client, dataset, model="org/base")["memory"]["parts"]["weights"] > 5e9
    other = api.new_key("other")
    with api.client(other) as stranger:
        assert estimate(stranger, upload(stranger), model="org/base")["memory"] is None


def test_the_position_counts_priority_and_other_tenants(any_api: Api) -> None:
    write_base(any_api)
    with any_api.client() as client, any_api.client(any_api.new_key("other")) as stranger:
        for _ in range(3):
            queued(any_api, client)
        url = "https://example.com/train.jsonl"
        assert estimate(client, url)["position"] == 4
        assert estimate(client, url, priority=5)["position"] == 1
        # Tenants take turns: of equals, the younger job comes last.
        position = estimate(stranger, url)["position"]
        assert position == 2
        queued(any_api, stranger)
        placed = stranger.get("/jobs").json()["data"][0]["id"]
        assert stranger.get(f"/jobs/{placed}").json()["position"] == position


@pytest.mark.parametrize(
    ("gib", "free", "warned"), [(80, None, False), (5, None, True), (80, 5, True), (None, None, False)]
)
def test_a_check_says_when_no_workers_card_has_enough(
    any_api: Api, gib: float | None, free: float | None, warned: bool
) -> None:
    shape = read_shape(LLAMA)
    assert shape is not None
    counted = {"rows": 600, "tokens": 60_000, "max_length": 1024, "longest_row_tokens": 948, "shape": shape.as_dict()}
    beat(any_api, "tiny", "NVIDIA GTX", 4)
    beat(any_api, "best", "NVIDIA card" if gib else None, gib or 0, free)
    with any_api.client() as client:
        job = client.post("/jobs", json={"model": "org/base", "dataset": "https://example.com/a.jsonl"}).json()["id"]
        with any_api.context.write() as session:
            check = lifecycle.claim_preflight(session, "p", 60)
            assert check is not None
            spec = JobSpec.model_validate(queries.row(session, "default", job).spec)
            memory, warnings = estimates.of_check(session, spec, counted)
            pins: dict[str, Any] = {"base_id": "b", "base_revision": None, "dataset_sha256": "0" * 64}
            lifecycle.accept(session, check, **pins, report=counted | memory, warnings=warnings)
        found = client.get(f"/jobs/{job}").json()["report"]["memory"]
        assert found["estimated_bytes"] == sum(found["estimated"]["parts"].values()) > 7e9
        assert found["batch"] == {
            "rows": 16 if gib == 80 and free is None else 1,
            "length": 948,
            "checkpointed_layers": 32,
        }
        events = client.get(f"/jobs/{job}/events").json()["data"]
        told = [event for event in events if event["name"] == "memory.tight"]
        assert [event["id"] for event in events] == list(range(1, len(events) + 1))
        assert [event["level"] for event in told] == (["warning"] if warned else [])
        if told:
            assert told[0]["data"]["largest_bytes"] == 5 * GIB and "NVIDIA card" in told[0]["message"]
