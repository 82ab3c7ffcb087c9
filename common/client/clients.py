"""The two clients: `Tunery` for threads, `AsyncTunery` for event loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from common.client.address import Address, find_server
from common.client.async_jobs import AsyncJobs
from common.client.jobs import Jobs
from common.client.resources import (
    AsyncBaseModels,
    AsyncDatasets,
    AsyncKeys,
    AsyncQuotas,
    AsyncWorkers,
    BaseModels,
    Datasets,
    Keys,
    Quotas,
    Workers,
)
from common.client.retries import Retries
from common.client.transport import AsyncTransport, Transport
from common.client.webhooks import AsyncWebhooks, Webhooks


class Tunery:
    """A Tunery server. Safe to use from several threads.

    ```python
    with Tunery() as client:
        dataset = client.datasets.upload("train.jsonl")
        job = client.jobs.create("meta-llama/Llama-3.1-8B-Instruct", dataset, suffix="support-bot").wait()
        job.download("support-bot")
    ```

    Args:
        url: otherwise `TUNERY_URL`, otherwise the server that `tunery up` started here.
        api_key: otherwise `TUNERY_API_KEY`, otherwise the key that `tunery up` left.
        data_dir: where `tunery up` left them; otherwise `TUNERY_DATA_DIR`, otherwise `.tunery`.
        retries: how often and how patiently calls are tried again.

    Raises:
        ServerNotFound: none of these names a server.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        data_dir: str | Path | None = None,
        retries: Retries | None = None,
    ):
        address = find_server(url, api_key, None if data_dir is None else Path(data_dir))
        self._transport = Transport(address, retries or Retries())
        self.jobs = Jobs(self._transport)
        self.datasets = Datasets(self._transport)
        self.base_models = BaseModels(self._transport)
        self.workers = Workers(self._transport)
        self.keys = Keys(self._transport)
        self.quotas = Quotas(self._transport)
        self.webhooks = Webhooks(self._transport)

    @property
    def address(self) -> Address:
        """The server's address."""
        return self._transport.address

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class AsyncTunery:
    """A Tunery server, from an event loop; the arguments and errors are those of `Tunery`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        data_dir: str | Path | None = None,
        retries: Retries | None = None,
    ):
        address = find_server(url, api_key, None if data_dir is None else Path(data_dir))
        self._transport = AsyncTransport(address, retries or Retries())
        self.jobs = AsyncJobs(self._transport)
        self.datasets = AsyncDatasets(self._transport)
        self.base_models = AsyncBaseModels(self._transport)
        self.workers = AsyncWorkers(self._transport)
        self.keys = AsyncKeys(self._transport)
        self.quotas = AsyncQuotas(self._transport)
        self.webhooks = AsyncWebhooks(self._transport)

    @property
    def address(self) -> Address:
        """The server's address."""
        return self._transport.address

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()
