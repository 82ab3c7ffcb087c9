"""A lost broker costs time, never a job: submit answers all the same, and claims resume once it is back."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.faults.stack import Stack, own_folder, running
from tests.processes import wait_until

ANSWER_S = 6.0
RESUME_S = 30.0
OUTAGE_S = 8.0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with own_folder() as folder, running(folder, "sqlite", random.Random(1)) as made:
        yield made


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx2.Client]:
    headers = {"authorization": f"Bearer {stack.key}"}
    with httpx2.Client(base_url=stack.url, headers=headers, timeout=30, trust_env=False) as made:
        yield made


def submit(client: httpx2.Client) -> str:
    upload = client.post("/datasets", files={"file": ("train.jsonl", b'{"text": "a"}\n')})
    spec: dict[str, Any] = {"model": "tiny", "dataset": f"dataset:{upload.json()['id']}"}
    begun = time.monotonic()
    answer = client.post("/jobs", content=json.dumps(spec), headers={"content-type": "application/json"})
    assert answer.status_code == 201 and time.monotonic() - begun < ANSWER_S
    return str(answer.json()["id"])


def status(client: httpx2.Client, job_id: str) -> str:
    return str(client.get(f"/jobs/{job_id}").json()["status"])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", ["refuse", "half_open", "stall", "wipe"])
def test_submit_answers_and_claims_resume(stack: Stack, client: httpx2.Client, way: str):
    before = submit(client)
    wait_until(lambda: status(client, before) == "succeeded", 60, "a job before the fault")
    broker, valkey = stack.proxies["broker"], stack.services["valkey"]
    if way == "wipe":
        valkey.before_start = stack.wipe_broker
        valkey.kill()
        broker.refuse()
    else:
        getattr(broker, way)()
    jobs = [submit(client)]
    begun = time.monotonic()
    while time.monotonic() - begun < OUTAGE_S:
        jobs.append(submit(client))
        time.sleep(1)
    wait_until(lambda: valkey.running and valkey.is_ready(), 30, "the broker to be back")
    broker.heal()
    healed = time.monotonic()
    wait_until(lambda: status(client, jobs[0]) in ("running", "succeeded"), RESUME_S, "the first claim")
    print(f"{way}: claimed {time.monotonic() - healed:.1f} s after the broker was back")
    for job_id in jobs:
        wait_until(lambda job_id=job_id: status(client, job_id) == "succeeded", 120, "every job to succeed")
