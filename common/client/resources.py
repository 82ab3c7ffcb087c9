"""The small resources of a client: datasets, base models, workers, keys, quotas."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Unpack

from common.client import requests
from common.client.pages import Page
from common.client.requests import PreviewFields
from common.client.sending import Progress
from common.client.threads import in_thread
from common.client.transport import AsyncTransport, Transport
from common.client.uploading import Resumed, Uploader, goes_direct
from common.errors import InfraError
from common.schemas.datasets import Dataset
from common.schemas.keys import KeyCreated, KeyRead
from common.schemas.previews import Preview
from common.schemas.quotas import Quota, QuotaLimits
from common.schemas.workers import BaseModelInfo, Worker


def _require_time(deadline: float, timeout_s: float) -> None:
    if time.monotonic() > deadline:
        raise InfraError(
            f"no preflight worker made the preview within {timeout_s:.0f} s",
            code="preview_late",
            hint="`tunery workers` lists them; one that checks a large dataset comes to previews afterwards",
        )


class Datasets:
    """Uploaded datasets."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def upload(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        direct: bool | None = None,
        on_progress: Progress | None = None,
        on_resume: Resumed | None = None,
    ) -> Dataset:
        """Upload a file and return its dataset, which `jobs.create` takes as it is.

        Args:
            path: a JSONL, JSON, CSV or Parquet file.
            name: another name than the file's.
            direct: whether its parts go straight to the object store, so that the same call goes on where an earlier
                one broke off; otherwise those of 64 MiB (`uploading.DIRECT_BYTES`) or more do.
            on_progress: told (name, bytes so far, bytes in all), perhaps from other threads.
            on_resume: told (bytes that are there, bytes in all) where an earlier upload goes on.

        Raises:
            UploadFailed: parts do not arrive at the object store.
        """
        file = Path(path)
        if goes_direct(file, direct):
            return Uploader(self._transport, on_progress, on_resume).upload(file, name)
        return self._transport.send(requests.upload_dataset(file, name, on_progress))

    def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Dataset]:
        """Return one page of datasets, newest first."""
        page = self._transport.send(requests.list_datasets(limit, after))
        return Page(page.data, page.has_more, page.next)

    def get(self, dataset: str) -> Dataset:
        """Return one dataset; takes an id or a URI."""
        return self._transport.send(requests.get_dataset(dataset))

    def preview(
        self, dataset: str | Dataset, model: str, *, timeout_s: float = 300, **fields: Unpack[PreviewFields]
    ) -> Preview:
        """Return rows as `model` will see them, token by token: `rows`, `offset`, `max_length`, `loss` and
        `chat_template` choose.

        Raises:
            InfraError: no preflight worker answered within `timeout_s`.
        """
        call, deadline = requests.preview_dataset(dataset, model, fields), time.monotonic() + timeout_s
        while (found := self._transport.send(call)).status == "waiting":
            _require_time(deadline, timeout_s)
        return found

    def delete(self, dataset: str) -> None:
        """Remove a dataset and its object; takes an id or a URI."""
        self._transport.send(requests.delete_dataset(dataset))


class BaseModels:
    """Base models that the server holds."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def list(self) -> Page[BaseModelInfo]:
        """Return the base models that need no hub."""
        page = self._transport.send(requests.list_base_models())
        return Page(page.data, page.has_more, page.next)


class Workers:
    """Worker processes."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def list(self) -> Page[Worker]:
        """Return the workers with heartbeat, device, state and the base held."""
        page = self._transport.send(requests.list_workers())
        return Page(page.data, page.has_more, page.next)

    def drain(self, worker: str) -> Worker:
        """Let a worker finish or hand back its job and take no other."""
        return self._transport.send(requests.drain_worker(worker))


class Keys:
    """API keys of the tenant."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def create(self, name: str, *, tenant: str | None = None) -> KeyCreated:
        """Make a key; its `key` is shown this once."""
        return self._transport.send(requests.create_key(name, tenant))

    def list(self, *, tenant: str | None = None) -> Page[KeyRead]:
        """Return the keys, without their secrets; an administrator may name another tenant."""
        page = self._transport.send(requests.list_keys(tenant))
        return Page(page.data, page.has_more, page.next)

    def revoke(self, key: str, *, tenant: str | None = None) -> None:
        """End a key, by its id."""
        self._transport.send(requests.revoke_key(key, tenant))


class Quotas:
    """What tenants may use."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def get(self, *, tenant: str | None = None) -> Quota:
        """Return the limits of your tenant and what it uses; an administrator may name another tenant."""
        return self._transport.send(requests.get_quota(tenant))

    def set(self, limits: QuotaLimits, *, tenant: str | None = None) -> Quota:
        """Set every limit of a tenant; for administrators."""
        return self._transport.send(requests.set_quota(limits, tenant))


class AsyncDatasets:
    """Uploaded datasets."""

    def __init__(self, transport: AsyncTransport):
        self._transport = transport

    async def upload(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        direct: bool | None = None,
        on_progress: Progress | None = None,
        on_resume: Resumed | None = None,
    ) -> Dataset:
        """Upload a file and return its dataset; arguments and errors are those of `Datasets.upload`.

        A cancelled task stops a direct upload at the next chunk and keeps the parts that arrived.
        """
        file = Path(path)
        if not goes_direct(file, direct):
            return await self._transport.send(requests.upload_dataset(file, name, on_progress))
        return await in_thread(
            self._transport,
            on_progress,
            lambda transport, report: Uploader(transport, report, on_resume).upload(file, name),
        )

    async def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Dataset]:
        """Return one page of datasets, newest first."""
        page = await self._transport.send(requests.list_datasets(limit, after))
        return Page(page.data, page.has_more, page.next)

    async def get(self, dataset: str) -> Dataset:
        """Return one dataset; takes an id or a URI."""
        return await self._transport.send(requests.get_dataset(dataset))

    async def preview(
        self, dataset: str | Dataset, model: str, *, timeout_s: float = 300, **fields: Unpack[PreviewFields]
    ) -> Preview:
        """Return rows as `model` will see them; arguments and errors are those of `Datasets.preview`."""
        call, deadline = requests.preview_dataset(dataset, model, fields), time.monotonic() + timeout_s
        while (found := await self._transport.send(call)).status == "waiting":
            _require_time(deadline, timeout_s)
        return found

    async def delete(self, dataset: str) -> None:
        """Remove a dataset and its object; takes an id or a URI."""
        await self._transport.send(requests.delete_dataset(dataset))


class AsyncBaseModels:
    """Base models that the server holds."""

    def __init__(self, transport: AsyncTransport):
        self._transport = transport

    async def list(self) -> Page[BaseModelInfo]:
        """Return the base models that need no hub."""
        page = await self._transport.send(requests.list_base_models())
        return Page(page.data, page.has_more, page.next)


class AsyncWorkers:
    """Worker processes."""

    def __init__(self, transport: AsyncTransport):
        self._transport = transport

    async def list(self) -> Page[Worker]:
        """Return the workers with heartbeat, device, state and the base held."""
        page = await self._transport.send(requests.list_workers())
        return Page(page.data, page.has_more, page.next)

    async def drain(self, worker: str) -> Worker:
        """Let a worker finish or hand back its job and take no other."""
        return await self._transport.send(requests.drain_worker(worker))


class AsyncKeys:
    """API keys of the tenant."""

    def __init__(self, transport: AsyncTransport):
        self._transport = transport

    async def create(self, name: str, *, tenant: str | None = None) -> KeyCreated:
        """Make a key; its `key` is shown this once."""
        return await self._transport.send(requests.create_key(name, tenant))

    async def list(self, *, tenant: str | None = None) -> Page[KeyRead]:
        """Return the keys, without their secrets; an administrator may name another tenant."""
        page = await self._transport.send(requests.list_keys(tenant))
        return Page(page.data, page.has_more, page.next)

    async def revoke(self, key: str, *, tenant: str | None = None) -> None:
        """End a key, by its id."""
        await self._transport.send(requests.revoke_key(key, tenant))


class AsyncQuotas:
    """What tenants may use."""

    def __init__(self, transport: AsyncTransport):
        self._transport = transport

    async def get(self, *, tenant: str | None = None) -> Quota:
        """Return the limits of your tenant and what it uses; an administrator may name another tenant."""
        return await self._transport.send(requests.get_quota(tenant))

    async def set(self, limits: QuotaLimits, *, tenant: str | None = None) -> Quota:
        """Set every limit of a tenant; for administrators."""
        return await self._transport.send(requests.set_quota(limits, tenant))
