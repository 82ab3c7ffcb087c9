"""A job says where it stands; waiting jobs are moved; quotas are kept and shown."""

from __future__ import annotations

import json

import httpx2
import pytest

from api import streams
from common import workers
from common.jobs import lifecycle
from common.workers import Beat
from tests.api.conftest import SPEC, Api, drive, finish
from tests.api.test_streams import follow


def submit(client: httpx2.Client, **changes: object) -> str:
    answer = client.post("/jobs", json={**SPEC, **changes})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def queued(api: Api, client: httpx2.Client, **changes: object) -> str:
    """Submit a job and let its check pass."""
    job_id = submit(client, **changes)
    with api.context.write() as session:
        check = lifecycle.claim_preflight(session, "p", 60)
        assert check is not None and check.job_id == job_id
        lifecycle.accept(session, check, base_id="b", base_revision=None, dataset_sha256="0" * 64, report={})
    return job_id


def beat(api: Api, worker: str) -> None:
    with api.context.write() as session:
        workers.beat(session, Beat(worker, worker, "train", "cpu", None, None, "idle"))


def test_a_job_says_where_it_stands(any_api: Api) -> None:
    with any_api.client() as client:
        beat(any_api, "w")
        first, second = queued(any_api, client), queued(any_api, client)
        found = client.get(f"/jobs/{second}").json()
        assert found["position"] == 2 and found["waits_for"]["code"] == "workers_busy"
        found = client.get(f"/jobs/{first}").json()
        assert found["position"] == 1 and found["waits_for"]["code"] == "worker_free" and found["expected_start"]
        listed = client.get("/jobs").json()["data"]
        assert [job["position"] for job in listed] == [None, None], "lists cost one query"
        with any_api.context.write() as session:
            claim = lifecycle.claim(session, "w", 60)
            assert claim is not None and claim.job_id == first
            lifecycle.advance(session, claim, progress={"eta_s": 42.0})
        running, waiting = client.get(f"/jobs/{first}"), client.get(f"/jobs/{second}")
        assert running.json()["waits_for"] is None and running.headers["retry-after"] == "42"
        assert waiting.json()["position"] == 1 and first in waiting.json()["waits_for"]["message"]
        assert 30 <= int(waiting.headers["retry-after"]) <= 52, "it starts when the other ends"
        finish(any_api.context, claim)
        assert "retry-after" not in client.get(f"/jobs/{first}").headers


def test_the_tag_moves_with_the_place(api: Api, client: httpx2.Client) -> None:
    job_id = queued(api, client)
    tag = client.get(f"/jobs/{job_id}").headers["etag"]
    same = client.get(f"/jobs/{job_id}", headers={"if-none-match": tag})
    assert same.status_code == 304 and same.headers["retry-after"]
    queued(api, client, priority=5)
    moved = client.get(f"/jobs/{job_id}", params={"wait": 30}, headers={"if-none-match": tag})
    assert moved.status_code == 200 and moved.json()["position"] == 2, "and a long poll knows at once"


def test_a_stream_tells_of_a_new_place(api: Api, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.1)
    job_id = queued(api, client)
    stream = follow(client, job_id)
    places = (json.loads(message.data)["position"] for message in stream if message.event == "job")
    assert next(places) == 1
    with api.client() as other:
        queued(api, other, priority=5)
    assert next(places) == 2
    stream.close()


def test_moving_a_job_that_waits(any_api: Api) -> None:
    with any_api.client() as client:
        first, second = queued(any_api, client), queued(any_api, client)
        moved = client.patch(f"/jobs/{second}", json={"priority": 3}).json()
        assert (moved["priority"], moved["position"]) == (3, 1)
        later = client.patch(f"/jobs/{second}", json={"not_before": "2100-01-01T00:00:00+02:00"}).json()
        assert (later["not_before"], later["position"]) == ("2099-12-31T22:00:00Z", None)
        assert later["waits_for"]["code"] == "not_before" and later["waits_for"]["until"] == later["not_before"]
        assert client.get(f"/jobs/{first}").json()["position"] == 1
        back = client.patch(f"/jobs/{second}", json={"not_before": None}).json()
        assert (back["not_before"], back["priority"], back["position"]) == (None, 3, 1)
        events = client.get(f"/jobs/{second}/events").json()["data"]
        assert next(event["data"] for event in events if event["name"] == "job.reordered") == {"priority": 3}
        with any_api.context.write() as session:
            claimed = lifecycle.claim(session, "w", 60)
        assert claimed is not None and claimed.job_id == second
        refused = client.patch(f"/jobs/{second}", json={"priority": 1})
        assert refused.status_code == 409 and refused.json()["code"] == "cannot_reorder"


@pytest.mark.parametrize(
    "body",
    [
        {}, {"priority": None}, {"priority": 101}, {"seed": 1}, {"not_before": "tomorrow"}, {"not_before": 5},
        {"not_before": "2030-01-01T00:00:00"}, {"not_before": "9999-12-31T23:59:59-12:00"},
        {"not_before": "0001-01-01T00:00:00+12:00"},
    ],
)  # fmt: skip
def test_an_order_that_says_nothing_or_nonsense(client: httpx2.Client, body: dict[str, object]) -> None:
    answer = client.patch(f"/jobs/{submit(client)}", json=body)
    assert answer.status_code == 400 and answer.json()["code"] == "invalid_input", answer.text


def test_a_job_keeps_the_time_that_it_was_submitted_with(client: httpx2.Client) -> None:
    made = client.post("/jobs", json={**SPEC, "not_before": "2100-01-01T00:00:00Z"})
    assert made.json()["not_before"] == "2100-01-01T00:00:00Z"
    again = client.get(f"/jobs/{made.json()['id']}").json()
    assert again["not_before"] == "2100-01-01T00:00:00Z" and again["waits_for"]["code"] == "no_checker"


def test_a_full_queue_is_refused_with_a_time_to_come_back(any_api: Api) -> None:
    with any_api.client() as admin, any_api.client(any_api.new_key("acme")) as acme:
        limits = {"max_queued": 2, "max_running": 1, "max_gpu_hours": 10.5, "max_priority": 5}
        answer = admin.put("/quota", params={"tenant": "acme"}, json=limits)
        assert answer.json() == {"tenant": "acme", **limits, "running": 0, "queued": 0, "gpu_hours": 0.0}
        first = submit(acme)
        submit(acme)
        refused = acme.post("/jobs", json=SPEC)
        assert refused.status_code == 429 and refused.json()["code"] == "quota_queued"
        assert int(refused.headers["retry-after"]) > 0
        assert acme.get("/quota").json()["queued"] == 2
        drive(any_api.context, first)
        assert (acme.get("/quota").json()["queued"], acme.get("/quota").json()["running"]) == (1, 1)
        submit(acme)
        too_high = acme.post("/jobs", json={**SPEC, "priority": 6})
        assert too_high.status_code == 400 and too_high.json()["param"] == "priority"
        lifted = admin.put("/quota", params={"tenant": "acme"}, json={}).json()
        assert [lifted[name] for name in limits] == [None] * 4
        submit(acme, priority=6)


def test_a_replayed_create_is_no_new_job_to_the_quota(api: Api, client: httpx2.Client) -> None:
    client.put("/quota", json={"max_queued": 1})
    key = {"idempotency-key": "k"}
    first = client.post("/jobs", json=SPEC, headers=key)
    again = client.post("/jobs", json=SPEC, headers=key)
    assert (first.status_code, again.status_code) == (201, 201) and first.json()["id"] == again.json()["id"]
    assert client.post(f"/jobs/{first.json()['id']}/cancel").status_code == 200
    assert client.post("/jobs", json=SPEC).status_code == 201
    retried = client.post(f"/jobs/{first.json()['id']}/retry")
    assert retried.status_code == 429, "a retry is a job more"


def test_quotas_belong_to_administrators(api: Api, client: httpx2.Client) -> None:
    with api.client(api.new_key("acme")) as acme:
        assert acme.put("/quota", json={"max_queued": 9}).status_code == 403
        assert acme.get("/quota", params={"tenant": "default"}).status_code == 403
        assert acme.get("/quota").json()["max_queued"] is None
        assert acme.get("/quota", params={"tenant": "acme"}).status_code == 200
    unknown = client.put("/quota", json={"max_jobs": 9})
    assert unknown.status_code == 400 and unknown.json()["param"] == "max_jobs"
    assert client.put("/quota", json={"max_gpu_hours": "many"}).status_code == 400
