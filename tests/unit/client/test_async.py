"""The client for event loops does what the other does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anyio
import pytest

from common.client import AsyncTunery, CannotConnect, Missing
from common.client.async_jobs import AsyncJob
from tests.unit.client.conftest import KEY, QUICK, a_job, a_metric, an_event
from tests.unit.client.peer import Peer, file, hangs_up, says, stream
from tests.unit.client.test_resources import DATASET

CONTENT = b"weights" * 100_000


def test_the_life_of_a_job(peer: Peer, tmp_path: Path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "x"}\n')
    peer.on("POST", "/datasets", says(DATASET, 201))
    peer.on("POST", "/jobs", hangs_up, says(a_job(), 201))
    peer.on(
        "GET",
        "/jobs/job_1/events",
        stream(("event", 1, an_event(1))),
        hangs_up,
        stream(("metric", 2, a_metric(2, 1, loss=1.0)), ("job", None, a_job(status="succeeded"))),
    )
    peer.on("GET", "/jobs/job_1", says(a_job(status="succeeded")))
    peer.on("GET", "/jobs/job_1/metrics", says({"data": [a_metric(2, 1, loss=1.0)], "has_more": False, "next": 2}))
    link = {"name": "adapter/w", "bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest(), "url": "/file"}
    peer.on("GET", "/jobs/job_1/artifacts", says({"data": [link]}))
    peer.on("GET", "/file", file(CONTENT, breaks_after=1000), file(CONTENT))
    peer.on("POST", "/jobs/job_1/export", hangs_up, says(a_job(id="job_3", source_job="job_1"), 201))

    async def live() -> None:
        async with AsyncTunery(peer.url, KEY, retries=QUICK) as client:
            job = await client.jobs.create("base", await client.datasets.upload(source))
            assert [type(update).__name__ async for update in job.watch()] == ["Event", "Metric", "AsyncJob"]
            ended = await job.wait(5)
            assert isinstance(ended, AsyncJob) and ended.status == "succeeded"
            assert await ended.metrics() == {"step": [1], "loss": [1.0]}
            (path,) = await ended.download(tmp_path / "out")
            assert path.read_bytes() == CONTENT
            merging = await ended.export_as(["merged", "merged_4bit"], priority=1)
            assert isinstance(merging, AsyncJob) and (merging.id, merging.source_job) == ("job_3", "job_1")
            with pytest.raises(Missing):
                await client.jobs.get("job_2")

    anyio.run(live)
    assert "authorization" not in peer.asked("GET", "/file")[0].headers


def test_nobody_at_the_address():
    async def ask() -> None:
        async with AsyncTunery("http://127.0.0.1:9", KEY, retries=QUICK) as client:
            await client.workers.list()

    with pytest.raises(CannotConnect):
        anyio.run(ask)
