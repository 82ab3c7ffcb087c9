"""Server-sent events: in order, without loss or repetition, whatever breaks in between."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2

from api.app import create_app
from common.jobs import lifecycle
from common.jobs.lifecycle import Claim, Event, MetricPoint
from tests.api.conftest import SPEC, Api, drive, finish, served

STREAM = {"accept": "text/event-stream"}


def submit(client: httpx2.Client) -> str:
    return str(client.post("/jobs", json=SPEC).json()["id"])


def follow(client: httpx2.Client, job_id: str, after: int | None = None) -> Iterator[httpx2.ServerSentEvent]:
    headers = STREAM if after is None else {**STREAM, "last-event-id": str(after)}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        yield from httpx2.EventSource(response)


def train(api: Api, claim: Claim, steps: int) -> None:
    """Report steps, each an event and a metric, and publish."""
    for step in range(steps):
        with api.context.write() as session:
            events, metrics = [Event("job.stepped", f"Step {step}.")], [MetricPoint(step, {"loss": 1.0 / (step + 1)})]
            lifecycle.advance(session, claim, progress={"step": step}, events=events, metrics=metrics)
    finish(api.context, claim)


def test_a_stream_that_breaks_loses_and_repeats_nothing(any_api: Api) -> None:
    with any_api.client() as client, ThreadPoolExecutor(1) as pool:
        job_id = submit(client)
        claim = drive(any_api.context, job_id)
        training = pool.submit(train, any_api, claim, 40)
        seen: list[int] = []
        ended = None
        while ended is None:
            for number, message in enumerate(follow(client, job_id, seen[-1] if seen else None)):
                if message.event == "job":
                    ended = json.loads(message.data) if json.loads(message.data)["status"] == "succeeded" else None
                else:
                    assert message.id == str(json.loads(message.data)["id"])
                    seen.append(int(message.id))
                if number == 9:
                    break
        training.result()
    # submitted, checking, accepted, claimed; two for each step; succeeded
    assert seen == list(range(1, 4 + 2 * 40 + 1 + 1))
    assert ended["step"] == 39


def test_a_stream_tells_what_happens_and_closes_at_the_end(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    stream = follow(client, job_id)
    first = next(stream)
    assert (first.event, first.id, json.loads(first.data)["name"]) == ("event", "1", "job.submitted")
    assert json.loads(next(stream).data)["status"] == "validating"
    client_two = api.client()
    client_two.post(f"/jobs/{job_id}/cancel")
    client_two.close()
    messages = list(stream)
    assert [message.event for message in messages] == ["event", "job"], "the server closes after the last state"
    assert json.loads(messages[-1].data)["status"] == "cancelled"
    again = list(follow(client, job_id, 2))
    assert [message.event for message in again] == ["job"], "who comes back after the end hears the end only"


def test_waiting_clients_hold_neither_threads_nor_connections(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    threads = threading.active_count()
    limits = httpx2.Limits(max_connections=200)
    headers = {"authorization": f"Bearer {api.key}"}
    with httpx2.Client(base_url=api.url, headers=headers, limits=limits, timeout=30, trust_env=False) as many:
        streams = [follow(many, job_id) for _ in range(60)]
        for stream in streams:
            next(stream)
        # Sync routes still find a thread, though more clients wait than there are threads.
        assert client.get("/jobs", timeout=10).status_code == 200
        pool = api.context.sessions.engine.pool
        assert pool.checkedout() <= 1, "only the poller may be looking"
        assert threading.active_count() - threads < 45
        client.post(f"/jobs/{job_id}/cancel")
        for stream in streams:
            assert list(stream)[-1].event == "job"


def test_a_stream_ends_when_the_job_is_deleted(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    client.post(f"/jobs/{job_id}/cancel")
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as response:
        assert response.status_code == 404


def test_a_closing_server_ends_its_streams(api: Api, client: httpx2.Client) -> None:
    job_id = submit(client)
    with served(create_app(api.context)) as url:
        second = httpx2.Client(base_url=url, headers=client.headers, timeout=30, trust_env=False)
        stream = follow(second, job_id)
        next(stream)
    assert all(message.event in ("job", "event") for message in stream), "the stream ends, and is not cut"
    second.close()


def test_a_revoked_key_hears_nothing_more(api: Api, client: httpx2.Client) -> None:
    lost = client.post("/keys", json={"name": "lost"}).json()
    job_id = submit(client)
    with api.client(lost["key"]) as thief, ThreadPoolExecutor(1) as pool:
        stream = follow(thief, job_id)
        while next(stream).event != "job":
            continue
        polling = pool.submit(thief.get, f"/jobs/{job_id}?wait=60")
        await_subscriptions(api, 2)
        assert client.delete(f"/keys/{lost['id']}").status_code == 204
        client.post(f"/jobs/{job_id}/cancel")
        assert list(stream) == []
        assert polling.result().status_code == 401


def await_subscriptions(api: Api, number: int) -> None:
    deadline = time.monotonic() + 30
    while len(api.watcher._subscriptions) < number:
        assert time.monotonic() < deadline
        time.sleep(0.05)
