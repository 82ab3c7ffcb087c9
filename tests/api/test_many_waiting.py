"""Clients that wait, of an API in a process of its own: a thousand of each kind cost it next to nothing, and a restart
costs them nothing.

`pytest tests/api/test_many_waiting.py -rP` prints the figures of docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from sqlalchemy import text

from common import context as contexts
from common import keys
from common.client import Retries, Tunery
from common.context import Context
from common.embedded.ports import free_ports
from common.jobs import lifecycle
from common.jobs.lifecycle import Claim, Event, MetricPoint
from common.schemas.jobs import Event as Told
from common.schemas.jobs import JobSpec, Metric
from common.settings import Settings
from tests.api.conftest import SPEC, drive, finish
from tests.processes import Process, Processes, wait_until

NUM_CLIENTS = 1000
NUM_JOBS = 20
# The API's worker threads, its pool, and its own.
THREADS_MOST, CONNECTIONS_MOST = 60, 20


@dataclass
class Installed:
    """A migrated installation over Postgres, whose API is a process."""

    context: Context
    processes: Processes
    key: str
    started: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.context.settings.port}"

    def api(self) -> Process:
        self.started += 1
        process = self.processes.start(f"api-{self.started}", ["api"], self.context.settings)

        def lives() -> bool:
            assert process.running, process.said()
            try:
                return httpx2.get(f"{self.url}/livez", trust_env=False).status_code == 200
            except httpx2.TransportError:
                return False

        wait_until(lives, 60, "the API")
        return process

    def running(self) -> Claim:
        with self.context.write() as session:
            job_id = lifecycle.submit(session, "default", JobSpec.model_validate(SPEC))
        return drive(self.context, job_id)

    def connections(self) -> tuple[int, int]:
        """Return how many connections to this database others have, and how many of them are at work."""
        with self.context.read() as session:
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            count = session.execute(text(f"SELECT count(*), count(*) FILTER (WHERE state <> 'idle') {others}")).one()
            return int(count[0]), int(count[1])


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Let this process and its children open as many files as they may: each connection is one at either end."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def installed(descriptors: None, settings: Settings, postgres_url: str, tmp_path: Path) -> Iterator[Installed]:
    made = settings.model_copy(update={"database_url": postgres_url, "port": free_ports(1)[0]})
    parts = contexts.build(made)
    with parts.write() as session:
        _, key = keys.create(session, name="test", tenant="default")
    processes = Processes(tmp_path)
    yield Installed(parts, processes, key)
    processes.end()
    parts.close()


@dataclass
class Crowd:
    """Clients that ask for jobs and wait; `arrived` counts those that wait, `heard` those that it told."""

    url: str
    key: str
    polling: set[object] = field(default_factory=set)
    streaming: int = 0
    heard: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def arrived(self) -> int:
        return len(self.polling) + self.streaming

    async def ask(self, path: str, accept: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        headers = {"Host": parts.netloc, "Authorization": f"Bearer {self.key}", "Accept": accept, "Connection": "close"}
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        await writer.drain()
        return reader, writer

    async def poll(self, job_id: str) -> None:
        answer = await self._polled(job_id)
        while b'"status":"running"' in answer and b'"step":7,' not in answer:
            # Held for as long as it asked for, and nothing has happened: it asks again.
            answer = await self._polled(job_id)
        self._told(b'"step":7,' in answer, "a long poll")

    async def _polled(self, job_id: str) -> bytes:
        reader, writer = await self.ask(f"/jobs/{job_id}?wait=60", "application/json")
        self.polling.add(asyncio.current_task())
        answer = await reader.read()
        writer.close()
        return answer

    async def follow(self, job_id: str) -> None:
        reader, writer = await self.ask(f"/jobs/{job_id}/events", "text/event-stream")
        await reader.readuntil(b"event: job\n")
        self.streaming += 1
        try:
            await reader.readuntil(b'"step":7,')
            self._told(True, "")
        except asyncio.IncompleteReadError:
            self._told(False, "a stream")
        writer.close()

    def _told(self, well: bool, who: str) -> None:
        if well:
            self.heard += 1
        else:
            self.broken.append(who)


def threads(process: Process) -> int:
    return len(list(Path(f"/proc/{process.pid}/task").iterdir()))


def memory_bytes(process: Process) -> int:
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(280)
def test_a_thousand_of_each_kind(installed: Installed) -> None:
    process = installed.api()
    claims = [installed.running() for _ in range(NUM_JOBS)]
    crowd = Crowd(installed.url, installed.key)
    before = threads(process), memory_bytes(process)

    async def live() -> None:
        began = time.monotonic()
        waiting = []
        for number in range(NUM_CLIENTS):
            for kind in (crowd.poll, crowd.follow):
                waiting.append(asyncio.create_task(kind(claims[number % NUM_JOBS].job_id)))
            if number % 50 == 49:
                # The backlog of a listening socket is short.
                await asyncio.sleep(0.05)
        while crowd.arrived < 2 * NUM_CLIENTS and time.monotonic() - began < 120:
            await asyncio.sleep(0.1)
        arrived_s = time.monotonic() - began
        await asyncio.sleep(5)
        held = threads(process), memory_bytes(process)
        connections = await asyncio.to_thread(lambda: [installed.connections() for _ in range(20)])
        quick = time.monotonic()
        async with httpx2.AsyncClient(trust_env=False, headers={"authorization": f"Bearer {installed.key}"}) as other:
            assert (await other.get(f"{installed.url}/jobs")).status_code == 200
        quick_s = time.monotonic() - quick
        began = time.monotonic()
        await asyncio.to_thread(tell)
        async with asyncio.timeout(100):
            await asyncio.gather(*waiting)
        told_s = time.monotonic() - began
        print(
            f"{NUM_CLIENTS} long polls and {NUM_CLIENTS} streams on {NUM_JOBS} jobs arrived in {arrived_s:.1f} s; "
            f"threads {before[0]} -> {held[0]}; memory {before[1] / 2**20:.0f} -> {held[1] / 2**20:.0f} MiB; "
            f"connections {max(each[0] for each in connections)}, at work {max(each[1] for each in connections)}; "
            f"another request took {quick_s * 1000:.0f} ms; all were told within {told_s:.1f} s"
        )
        assert held[0] <= THREADS_MOST
        assert max(each[0] for each in connections) <= CONNECTIONS_MOST
        assert max(each[1] for each in connections) <= 2, "only the one who looks for all may be looking"

    def tell() -> None:
        for claim in claims:
            with installed.context.write() as session:
                lifecycle.advance(session, claim, progress={"step": 7})

    asyncio.run(live())
    assert (crowd.arrived, crowd.heard, crowd.broken) == (2 * NUM_CLIENTS, 2 * NUM_CLIENTS, [])


def test_streams_and_waits_survive_a_restart_of_the_api(installed: Installed) -> None:
    """Killed and started again in the middle, twice: the same client hears everything once, in order."""
    process = installed.api()
    claim = installed.running()
    seen: list[int] = []
    statuses: list[str] = []
    ended: list[str] = []
    patient = Retries(limit=200, first_s=0.05, longest_s=0.2)

    def watch() -> None:
        with Tunery(installed.url, installed.key, retries=patient) as client:
            for update in client.jobs.watch(claim.job_id):
                if isinstance(update, Told | Metric):
                    seen.append(update.id)
                else:
                    statuses.append(update.status)

    def wait() -> None:
        with Tunery(installed.url, installed.key, retries=patient) as client:
            ended.append(client.jobs.wait(claim.job_id, 120).status)

    waiting = [threading.Thread(target=work) for work in (watch, wait)]
    for thread in waiting:
        thread.start()
    total = 60
    for step in range(total):
        with installed.context.write() as session:
            point = MetricPoint(step, {"loss": 1.0})
            told = [Event("job.stepped", f"Step {step}.")]
            lifecycle.advance(session, claim, progress={"step": step}, events=told, metrics=[point])
        if step in (20, 40):
            wait_until(lambda: len(seen) > 10, 30, "the client to hear something")
            process.signal(signal.SIGKILL if step == 20 else signal.SIGTERM)
            process.wait()
            process = installed.api()
    finish(installed.context, claim)
    for thread in waiting:
        thread.join(60)
        assert not thread.is_alive()
    # submitted, checking, accepted, claimed; two of each step; succeeded
    assert seen == list(range(1, 4 + 2 * total + 1 + 1))
    assert statuses[-1] == "succeeded" and ended == ["succeeded"]


def test_a_raw_client_goes_on_where_a_killed_api_broke_off(installed: Installed) -> None:
    process = installed.api()
    claim = installed.running()
    headers = {"authorization": f"Bearer {installed.key}", "accept": "text/event-stream"}
    url = f"{installed.url}/jobs/{claim.job_id}/events"
    seen: list[int] = []
    with httpx2.Client(trust_env=False, headers=headers) as client:
        with pytest.raises(httpx2.TransportError), client.stream("GET", url) as response:
            for message in httpx2.EventSource(response):
                seen += [int(message.id)] if message.event == "event" else []
                if len(seen) == 4:
                    process.signal(signal.SIGKILL)
        process.wait()
        finish(installed.context, claim)
        installed.api()
        with client.stream("GET", url, headers={"last-event-id": str(seen[-1])}) as response:
            rest = [message for message in httpx2.EventSource(response)]
    assert seen == [1, 2, 3, 4] and [message.event for message in rest] == ["event", "job"]
    assert rest[0].id == "5" and json.loads(rest[1].data)["status"] == "succeeded"
