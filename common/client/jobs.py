"""`client.jobs`, and the `Job` that it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import httpx2
from pydantic import PrivateAttr

from common.client import requests
from common.client.downloading import Downloader
from common.client.errors import ApiError
from common.client.pages import Page
from common.client.requests import CloneFields, FilterFields, JobFields, OrderFields
from common.client.sending import Progress
from common.client.transport import Transport
from common.client.watching import STREAM_TIMEOUT_S, Cursor, Patience, columns, opened
from common.schemas.bulk import CancelOutcome
from common.schemas.checkpoints import Checkpoint
from common.schemas.datasets import Dataset
from common.schemas.estimates import JobEstimate
from common.schemas.jobs import TERMINAL, Artifact, Event, JobRead, Metric
from common.schemas.precision import PrecisionRead

# `list` is a method below, so that inside the class the word is no type.
Columns = dict[str, list[Any]]
Events = list[Event]
Metrics = list[Metric]
Artifacts = list[Artifact]
Checkpoints = list[Checkpoint]
Outcomes = list[CancelOutcome]
Paths = list[Path]


class Job(JobRead):
    """A job as it was when it was asked for; its methods ask again."""

    _jobs: Jobs = PrivateAttr()

    def refresh(self) -> Job:
        """Return the job as it is now."""
        return self._jobs.get(self.id)

    def cancel(self) -> Job:
        """Stop the job; what it trained so far is not published."""
        return self._jobs.cancel(self.id)

    def pause(self) -> Job:
        """Stop the job at its next checkpoint, to be resumed."""
        return self._jobs.pause(self.id)

    def resume(self) -> Job:
        """Queue the paused job again; it goes on from its last checkpoint."""
        return self._jobs.resume(self.id)

    def retry(self) -> Job:
        """Submit what the failed or cancelled job asked for as a new job, which goes on from its checkpoints."""
        return self._jobs.retry(self.id)

    def clone(self, **changes: Unpack[CloneFields]) -> Job:
        """Submit what the job asked for as a new job, with changes; see `Jobs.clone`."""
        return self._jobs.clone(self.id, **changes)

    def export_as(self, forms: str | Sequence[str] = "merged", *, priority: int = 0) -> Job:
        """Return the job that merges this finished job's adapter; see `Jobs.export`."""
        return self._jobs.export(self.id, forms, priority=priority)

    def reorder(self, **order: Unpack[OrderFields]) -> Job:
        """Give the waiting job another priority or `not_before`; see `Jobs.reorder`."""
        return self._jobs.reorder(self.id, **order)

    def delete(self) -> None:
        """Remove the ended job and its objects."""
        self._jobs.delete(self.id)

    def wait(self, timeout_s: float | None = None) -> Job:
        """Return the job once it has ended; see `Jobs.wait`."""
        return self._jobs.wait(self.id, timeout_s)

    def watch(self, after: int = 0) -> Iterator[Event | Metric | Job]:
        """Yield what happens to the job until it ends; see `Jobs.watch`."""
        return self._jobs.watch(self.id, after)

    def events(self, after: int = 0) -> Events:
        """Return every event behind the cursor `after`."""
        return self._jobs.events(self.id, after)

    def metrics(self, kind: str = "train") -> Columns:
        """Return the metrics of one kind, `train` or `eval`, as columns: `step` and each logged value."""
        return columns(self._jobs.metrics(self.id), kind)

    def artifacts(self) -> Artifacts:
        """Return every published file with a fresh signed link."""
        return self._jobs.artifacts(self.id)

    def precision(self) -> PrecisionRead:
        """Return how each module was held: bits, trained, frozen, or not quantisable."""
        return self._jobs.precision(self.id)

    def checkpoints(self) -> Checkpoints:
        """Return every complete checkpoint, the highest step first."""
        return self._jobs.checkpoints(self.id)

    def download(self, folder: str | Path, *, adapter_only: bool = False, on_progress: Progress | None = None) -> Paths:
        """Fetch the published files into `folder`; see `Jobs.download`."""
        return self._jobs.download(self.id, folder, adapter_only=adapter_only, on_progress=on_progress)


class Jobs:
    """The jobs of the key's tenant. Every method raises what `common.client.errors` draws."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def create(
        self, model: str, dataset: str | Dataset, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> Job:
        """Submit a job and return it. A broken connection does not make a second one.

        Args:
            model: hub id (`org/name[@revision]`) or a folder of the server's.
            dataset: a URI, or what `client.datasets.upload` answered.
            idempotency_key: one of your own makes the create the same across restarts of your program.
            fields: the other fields of `POST /jobs`: hyperparameters, lora, suffix, …
        """
        return self._own(self._transport.send(requests.create_job(model, dataset, fields, idempotency_key)))

    def estimate(self, model: str, dataset: str | Dataset, **fields: Unpack[JobFields]) -> JobEstimate:
        """Return what such a job would take: tokens, steps, memory, each worker, time. Creates nothing."""
        return self._transport.send(requests.estimate_job(model, dataset, fields))

    def clone(self, job: str, *, idempotency_key: str | None = None, **changes: Unpack[CloneFields]) -> Job:
        """Submit what a job asked for as a new job, with changes: mappings are merged, None means the default.

        ```python
        client.jobs.clone(job, hyperparameters={"learning_rate": 1e-4}, suffix="slower")
        ```
        """
        return self._own(self._transport.send(requests.clone_job(job, changes, idempotency_key)))

    def list(self, *, limit: int | None = None, after: str | None = None, **wanted: Unpack[FilterFields]) -> Page[Job]:
        """Return one page of jobs, newest first: of these states, labels, model or times, or all."""
        page = self._transport.send(requests.list_jobs(wanted, limit, after))
        return Page([self._own(job) for job in page.data], page.has_more, page.next)

    def cancel_many(
        self, ids: Sequence[str] | None = None, *, dry_run: bool = False, **wanted: Unpack[FilterFields]
    ) -> Outcomes:
        """Cancel these jobs, or those that meet every condition, and return what happened to each.

        With `dry_run`, nothing happens, and what would is returned.
        """
        found: Outcomes = []
        after = None
        while True:
            page = self._transport.send(requests.cancel_jobs(ids, wanted, after, dry_run))
            found += page.data
            if not page.has_more or page.next is None:
                return found
            after = page.next

    def get(self, job: str) -> Job:
        """Return one job."""
        return self._own(self._transport.send(requests.get_job(job)))

    def cancel(self, job: str) -> Job:
        """Stop a job; what it trained so far is not published."""
        return self._act(job, "cancel")

    def pause(self, job: str) -> Job:
        """Stop a job at its next checkpoint, to be resumed."""
        return self._act(job, "pause")

    def resume(self, job: str) -> Job:
        """Queue a paused job again; it goes on from its last checkpoint."""
        return self._act(job, "resume")

    def retry(self, job: str) -> Job:
        """Submit what a failed or cancelled job asked for as a new job, which goes on from its checkpoints."""
        return self._act(job, "retry")

    def export(self, job: str, forms: str | Sequence[str] = "merged", *, priority: int = 0) -> Job:
        """Return the job that merges the adapter of a finished one: `merged`, `merged_dequantized`, `merged_4bit`.

        What is published already, or being made, is not made twice: the answer is the job that does. Afterwards the
        files are among the artifacts of the finished job too.
        """
        return self._own(self._transport.send(requests.export_job(job, forms, priority)))

    def reorder(self, job: str, **order: Unpack[OrderFields]) -> Job:
        """Give a job that waits another priority, or another moment before which it is not started (None: none)."""
        return self._own(self._transport.send(requests.reorder_job(job, order)))

    def delete(self, job: str) -> None:
        """Remove an ended job and its objects."""
        self._transport.send(requests.delete_job(job))

    def wait(self, job: str, timeout_s: float | None = None) -> Job:
        """Return the job once it has ended, in whichever way.

        Raises:
            TimeoutError: it has not ended after `timeout_s` seconds.
        """
        patience = Patience(timeout_s)
        while True:
            found = self._own(self._transport.send(requests.await_job(job, patience.left_s())))
            if found.status in TERMINAL:
                return found
            self._transport.sleep(patience.pause_s(found))

    def watch(self, job: str, after: int = 0) -> Iterator[Event | Metric | Job]:
        """Yield events, metrics and changes of the job behind the cursor `after`, until it has ended.

        Broken connections are made again where they broke: nothing is lost, nothing comes twice. The last thing
        yielded is the ended job.
        """
        cursor = Cursor(self._transport.address.url, after, retries=self._transport.retries)
        while not cursor.finished:
            error: Exception | None = None
            try:
                yield from self._stream(job, cursor)
            except (httpx2.TransportError, ApiError) as broken:
                error = broken
            if not cursor.finished:
                self._transport.sleep(cursor.pause_s(error))

    def _stream(self, job: str, cursor: Cursor) -> Iterator[Event | Metric | Job]:
        path = requests.events_path(job)
        with self._transport.stream(path, cursor.headers(), STREAM_TIMEOUT_S) as response:
            if response.status_code >= 400:
                response.read()
            opened(response)
            for message in httpx2.EventSource(response):
                update = cursor.take(message, Job)
                if isinstance(update, Job):
                    update._jobs = self
                if update is not None:
                    yield update
                if cursor.finished:
                    return

    def events(self, job: str, after: int = 0) -> Events:
        """Return every event behind the cursor `after`, oldest first."""
        found: Events = []
        while True:
            page = self._transport.send(requests.job_events(job, after))
            found += page.data
            if not page.has_more or page.next <= after:
                return found
            after = page.next

    def metrics(self, job: str, after: int = 0) -> Metrics:
        """Return every metric behind the cursor `after`, oldest first."""
        found: Metrics = []
        while True:
            page = self._transport.send(requests.job_metrics(job, after))
            found += page.data
            if not page.has_more or page.next <= after:
                return found
            after = page.next

    def artifacts(self, job: str) -> Artifacts:
        """Return every published file with a fresh signed link."""
        return self._transport.send(requests.job_artifacts(job)).data

    def precision(self, job: str) -> PrecisionRead:
        """Return how each module of a finished job's model was held: bits, trained, frozen, or not quantisable."""
        return self._transport.send(requests.job_precision(job))

    def checkpoints(self, job: str) -> Checkpoints:
        """Return every complete checkpoint, the highest step first."""
        return self._transport.send(requests.job_checkpoints(job)).data

    def download(
        self, job: str, folder: str | Path, *, adapter_only: bool = False, on_progress: Progress | None = None
    ) -> Paths:
        """Fetch the published files into `folder`, laid out by name, and return their paths.

        Every file's SHA-256 is verified; a download that broke off goes on where it did; a file is never half there.
        """
        transport = self._transport
        downloader = Downloader(
            transport.address.url, lambda: self.artifacts(job), transport.retries, transport.sleep, on_progress
        )
        return downloader.fetch(Path(folder), adapter_only=adapter_only)

    def _act(self, job: str, action: str) -> Job:
        return self._own(self._transport.send(requests.act_on_job(job, action)))

    def _own(self, read: JobRead) -> Job:
        job = Job.model_construct(**dict(read))
        job._jobs = self
        return job
