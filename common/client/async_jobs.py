"""`client.jobs` of `AsyncTunery`, and the `AsyncJob` that it answers: `jobs.py` for event loops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Unpack

import httpx2
from pydantic import PrivateAttr

from common.client import requests
from common.client.errors import ApiError
from common.client.jobs import Artifacts, Checkpoints, Columns, Events, Jobs, Metrics, Outcomes, Paths
from common.client.pages import Page
from common.client.requests import CloneFields, FilterFields, JobFields, OrderFields
from common.client.sending import Progress
from common.client.threads import in_thread
from common.client.transport import AsyncTransport
from common.client.watching import STREAM_TIMEOUT_S, Cursor, Patience, columns, opened
from common.schemas.datasets import Dataset
from common.schemas.estimates import JobEstimate
from common.schemas.jobs import TERMINAL, Event, JobRead, Metric
from common.schemas.precision import PrecisionRead


class AsyncJob(JobRead):
    """A job as it was when it was asked for; its methods ask again."""

    _jobs: AsyncJobs = PrivateAttr()

    async def refresh(self) -> AsyncJob:
        """Return the job as it is now."""
        return await self._jobs.get(self.id)

    async def cancel(self) -> AsyncJob:
        """Stop the job; what it trained so far is not published."""
        return await self._jobs.cancel(self.id)

    async def pause(self) -> AsyncJob:
        """Stop the job at its next checkpoint, to be resumed."""
        return await self._jobs.pause(self.id)

    async def resume(self) -> AsyncJob:
        """Queue the paused job again; it goes on from its last checkpoint."""
        return await self._jobs.resume(self.id)

    async def retry(self) -> AsyncJob:
        """Submit what the failed or cancelled job asked for as a new job, which goes on from its checkpoints."""
        return await self._jobs.retry(self.id)

    async def clone(self, **changes: Unpack[CloneFields]) -> AsyncJob:
        """Submit what the job asked for as a new job, with changes; see `Jobs.clone`."""
        return await self._jobs.clone(self.id, **changes)

    async def export_as(self, forms: str | Sequence[str] = "merged", *, priority: int = 0) -> AsyncJob:
        """Return the job that merges this finished job's adapter; see `Jobs.export`."""
        return await self._jobs.export(self.id, forms, priority=priority)

    async def reorder(self, **order: Unpack[OrderFields]) -> AsyncJob:
        """Give the waiting job another priority or `not_before`; see `Jobs.reorder`."""
        return await self._jobs.reorder(self.id, **order)

    async def delete(self) -> None:
        """Remove the ended job and its objects."""
        await self._jobs.delete(self.id)

    async def wait(self, timeout_s: float | None = None) -> AsyncJob:
        """Return the job once it has ended; see `Jobs.wait`."""
        return await self._jobs.wait(self.id, timeout_s)

    def watch(self, after: int = 0) -> AsyncIterator[Event | Metric | AsyncJob]:
        """Yield what happens to the job until it ends; see `Jobs.watch`."""
        return self._jobs.watch(self.id, after)

    async def events(self, after: int = 0) -> Events:
        """Return every event behind the cursor `after`."""
        return await self._jobs.events(self.id, after)

    async def metrics(self, kind: str = "train") -> Columns:
        """Return the metrics of one kind, `train` or `eval`, as columns: `step` and each logged value."""
        return columns(await self._jobs.metrics(self.id), kind)

    async def artifacts(self) -> Artifacts:
        """Return every published file with a fresh signed link."""
        return await self._jobs.artifacts(self.id)

    async def precision(self) -> PrecisionRead:
        """Return how each module was held: bits, trained, frozen, or not quantisable."""
        return await self._jobs.precision(self.id)

    async def checkpoints(self) -> Checkpoints:
        """Return every complete checkpoint, the highest step first."""
        return await self._jobs.checkpoints(self.id)

    async def download(
        self, folder: str | Path, *, adapter_only: bool = False, on_progress: Progress | None = None
    ) -> Paths:
        """Fetch the published files into `folder`; see `Jobs.download`."""
        return await self._jobs.download(self.id, folder, adapter_only=adapter_only, on_progress=on_progress)


class AsyncJobs:
    """The jobs of the key's tenant. Every method raises what `common.client.errors` draws."""

    def __init__(self, transport: AsyncTransport):
        self._transport = transport

    async def create(
        self, model: str, dataset: str | Dataset, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> AsyncJob:
        """Submit a job and return it. A broken connection does not make a second one.

        Args:
            model: hub id (`org/name[@revision]`) or a folder of the server's.
            dataset: a URI, or what `client.datasets.upload` answered.
            idempotency_key: one of your own makes the create the same across restarts of your program.
            fields: the other fields of `POST /jobs`: hyperparameters, lora, suffix, …
        """
        return self._own(await self._transport.send(requests.create_job(model, dataset, fields, idempotency_key)))

    async def estimate(self, model: str, dataset: str | Dataset, **fields: Unpack[JobFields]) -> JobEstimate:
        """Return what such a job would take: tokens, steps, memory, each worker, time. Creates nothing."""
        return await self._transport.send(requests.estimate_job(model, dataset, fields))

    async def clone(self, job: str, *, idempotency_key: str | None = None, **changes: Unpack[CloneFields]) -> AsyncJob:
        """Submit what a job asked for as a new job, with changes: mappings are merged, None means the default.

        ```python
        await client.jobs.clone(job, hyperparameters={"learning_rate": 1e-4}, suffix="slower")
        ```
        """
        return self._own(await self._transport.send(requests.clone_job(job, changes, idempotency_key)))

    async def list(
        self, *, limit: int | None = None, after: str | None = None, **wanted: Unpack[FilterFields]
    ) -> Page[AsyncJob]:
        """Return one page of jobs, newest first: of these states, labels, model or times, or all."""
        page = await self._transport.send(requests.list_jobs(wanted, limit, after))
        return Page([self._own(job) for job in page.data], page.has_more, page.next)

    async def cancel_many(
        self, ids: Sequence[str] | None = None, *, dry_run: bool = False, **wanted: Unpack[FilterFields]
    ) -> Outcomes:
        """Cancel these jobs, or those that meet every condition, and return what happened to each.

        With `dry_run`, nothing happens, and what would is returned.
        """
        found: Outcomes = []
        after = None
        while True:
            page = await self._transport.send(requests.cancel_jobs(ids, wanted, after, dry_run))
            found += page.data
            if not page.has_more or page.next is None:
                return found
            after = page.next

    async def get(self, job: str) -> AsyncJob:
        """Return one job."""
        return self._own(await self._transport.send(requests.get_job(job)))

    async def cancel(self, job: str) -> AsyncJob:
        """Stop a job; what it trained so far is not published."""
        return await self._act(job, "cancel")

    async def pause(self, job: str) -> AsyncJob:
        """Stop a job at its next checkpoint, to be resumed."""
        return await self._act(job, "pause")

    async def resume(self, job: str) -> AsyncJob:
        """Queue a paused job again; it goes on from its last checkpoint."""
        return await self._act(job, "resume")

    async def retry(self, job: str) -> AsyncJob:
        """Submit what a failed or cancelled job asked for as a new job, which goes on from its checkpoints."""
        return await self._act(job, "retry")

    async def export(self, job: str, forms: str | Sequence[str] = "merged", *, priority: int = 0) -> AsyncJob:
        """Return the job that merges the adapter of a finished one: `merged`, `merged_dequantized`, `merged_4bit`.

        What is published already, or being made, is not made twice: the answer is the job that does. Afterwards the
        files are among the artifacts of the finished job too.
        """
        return self._own(await self._transport.send(requests.export_job(job, forms, priority)))

    async def reorder(self, job: str, **order: Unpack[OrderFields]) -> AsyncJob:
        """Give a job that waits another priority, or another moment before which it is not started (None: none)."""
        return self._own(await self._transport.send(requests.reorder_job(job, order)))

    async def delete(self, job: str) -> None:
        """Remove an ended job and its objects."""
        await self._transport.send(requests.delete_job(job))

    async def wait(self, job: str, timeout_s: float | None = None) -> AsyncJob:
        """Return the job once it has ended, in whichever way.

        Raises:
            TimeoutError: it has not ended after `timeout_s` seconds.
        """
        patience = Patience(timeout_s)
        while True:
            found = self._own(await self._transport.send(requests.await_job(job, patience.left_s())))
            if found.status in TERMINAL:
                return found
            await self._transport.sleep(patience.pause_s(found))

    async def watch(self, job: str, after: int = 0) -> AsyncIterator[Event | Metric | AsyncJob]:
        """Yield events, metrics and changes of the job behind the cursor `after`, until it has ended.

        Broken connections are made again where they broke: nothing is lost, nothing comes twice. The last thing
        yielded is the ended job.
        """
        cursor = Cursor(self._transport.address.url, after, retries=self._transport.retries)
        while not cursor.finished:
            error: Exception | None = None
            try:
                async for update in self._stream(job, cursor):
                    yield update
            except (httpx2.TransportError, ApiError) as broken:
                error = broken
            if not cursor.finished:
                await self._transport.sleep(cursor.pause_s(error))

    async def _stream(self, job: str, cursor: Cursor) -> AsyncIterator[Event | Metric | AsyncJob]:
        path = requests.events_path(job)
        async with self._transport.stream(path, cursor.headers(), STREAM_TIMEOUT_S) as response:
            if response.status_code >= 400:
                await response.aread()
            opened(response)
            async for message in httpx2.EventSource(response):
                update = cursor.take(message, AsyncJob)
                if isinstance(update, AsyncJob):
                    update._jobs = self
                if update is not None:
                    yield update
                if cursor.finished:
                    return

    async def events(self, job: str, after: int = 0) -> Events:
        """Return every event behind the cursor `after`, oldest first."""
        found: Events = []
        while True:
            page = await self._transport.send(requests.job_events(job, after))
            found += page.data
            if not page.has_more or page.next <= after:
                return found
            after = page.next

    async def metrics(self, job: str, after: int = 0) -> Metrics:
        """Return every metric behind the cursor `after`, oldest first."""
        found: Metrics = []
        while True:
            page = await self._transport.send(requests.job_metrics(job, after))
            found += page.data
            if not page.has_more or page.next <= after:
                return found
            after = page.next

    async def artifacts(self, job: str) -> Artifacts:
        """Return every published file with a fresh signed link."""
        return (await self._transport.send(requests.job_artifacts(job))).data

    async def precision(self, job: str) -> PrecisionRead:
        """Return how each module of a finished job's model was held: bits, trained, frozen, or not quantisable."""
        return await self._transport.send(requests.job_precision(job))

    async def checkpoints(self, job: str) -> Checkpoints:
        """Return every complete checkpoint, the highest step first."""
        return (await self._transport.send(requests.job_checkpoints(job))).data

    async def download(
        self, job: str, folder: str | Path, *, adapter_only: bool = False, on_progress: Progress | None = None
    ) -> Paths:
        """Fetch the published files into `folder`, laid out by name, and return their paths; see `Jobs.download`.

        Files and hashes are work for a thread; a cancelled task stops it at the next chunk and keeps what arrived.
        """
        return await in_thread(
            self._transport,
            on_progress,
            lambda transport, report: Jobs(transport).download(
                job, folder, adapter_only=adapter_only, on_progress=report
            ),
        )

    async def _act(self, job: str, action: str) -> AsyncJob:
        return self._own(await self._transport.send(requests.act_on_job(job, action)))

    def _own(self, read: JobRead) -> AsyncJob:
        job = AsyncJob.model_construct(**dict(read))
        job._jobs = self
        return job
