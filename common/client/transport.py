"""Sends calls over HTTP and waits for their answers: once for threads, once for event loops, by the same rules."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from importlib import metadata
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx2
from pydantic import BaseModel

from common.client.address import Address
from common.client.calls import CONNECT_TIMEOUT_S, Call, read
from common.client.errors import connection_error
from common.client.retries import Retries

T = TypeVar("T", bound=BaseModel)

READ_TIMEOUT_S = 30


class Transport:
    """Sends calls from a thread."""

    def __init__(self, address: Address, retries: Retries, sleep: Callable[[float], None] = time.sleep):
        self.address = address
        self.retries = retries
        self.sleep = sleep
        self.http = httpx2.Client(**_options(address))

    def send(self, call: Call[T]) -> T:
        """Return the call's answer; raises what `read` does, and CannotConnect."""
        attempt = 0
        while True:
            attempt += 1
            try:
                response = self._once(call)
            except httpx2.TransportError as error:
                pause = self.retries.after_error(call, attempt, error)
                if pause is None:
                    raise connection_error(self.address.url, error) from error
            else:
                pause = self.retries.after_answer(call, attempt, response)
                if pause is None:
                    return read(call, response, attempt)
            self.sleep(pause)

    def _once(self, call: Call[T]) -> httpx2.Response:
        if call.upload is None:
            return self.http.request(call.method, call.path, **call.arguments())
        with call.upload.open() as files:
            return self.http.request(call.method, call.path, files=files, **call.arguments())

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str], read_timeout_s: float) -> Iterator[httpx2.Response]:
        """Open a GET whose body is read as it comes; no retries."""
        timeout = httpx2.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S)
        with self.http.stream("GET", path, headers=dict(headers), timeout=timeout) as response:
            yield response


class AsyncTransport:
    """Sends calls from an event loop, asyncio's or trio's."""

    def __init__(self, address: Address, retries: Retries, sleep: Callable[[float], Awaitable[None]] = anyio.sleep):
        self.address = address
        self.retries = retries
        self.sleep = sleep
        self.http = httpx2.AsyncClient(**_options(address))

    async def send(self, call: Call[T]) -> T:
        """Return the call's answer; raises what `read` does, and CannotConnect."""
        attempt = 0
        while True:
            attempt += 1
            try:
                response = await self._once(call)
            except httpx2.TransportError as error:
                pause = self.retries.after_error(call, attempt, error)
                if pause is None:
                    raise connection_error(self.address.url, error) from error
            else:
                pause = self.retries.after_answer(call, attempt, response)
                if pause is None:
                    return read(call, response, attempt)
            await self.sleep(pause)

    async def _once(self, call: Call[T]) -> httpx2.Response:
        if call.upload is None:
            return await self.http.request(call.method, call.path, **call.arguments())
        with call.upload.open() as files:
            return await self.http.request(call.method, call.path, files=files, **call.arguments())

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()

    @asynccontextmanager
    async def stream(
        self, path: str, headers: Mapping[str, str], read_timeout_s: float
    ) -> AsyncIterator[httpx2.Response]:
        """Open a GET whose body is read as it comes; no retries."""
        timeout = httpx2.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S)
        async with self.http.stream("GET", path, headers=dict(headers), timeout=timeout) as response:
            yield response


def _options(address: Address) -> dict[str, Any]:
    headers = {"user-agent": f"tunery/{_version()}", "accept": "application/json"}
    if address.api_key:
        headers["authorization"] = f"Bearer {address.api_key}"
    return {
        "base_url": address.url,
        "headers": headers,
        "timeout": httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        # A redirect is read by whoever asked for it: followed, it could carry the key to another host.
        "follow_redirects": False,
        "trust_env": trusts_environment(address.url),
    }


def trusts_environment(url: str) -> bool:
    """Return whether proxies from the environment apply: none of them reaches a server on this machine's loopback."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def _version() -> str:
    try:
        return metadata.version("tunery")
    except metadata.PackageNotFoundError:
        return "0"
