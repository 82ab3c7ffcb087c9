"""One attempt of a webhook: signed, to an address that was checked, without following redirects, within a deadline."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from concurrent.futures import Executor
from urllib.parse import SplitResult, urlsplit

import httpx2

from common import addresses
from common.addresses import Address
from common.client.retries import retry_after_s
from common.settings import Settings
from common.webhooks import signing
from common.webhooks.outbox import Due, Result
from worker import resolving

# From the look-up of the name to the status of the answer. The specification recommends 15 to 30 s.
DEADLINE_S = 15.0
_RETRY_AFTER_MAX_S = 86_400.0
_REFUSED = "the host leads to an address that is neither public nor in the operator's list"


async def post(due: Due, settings: Settings, tls: ssl.SSLContext, names: Executor) -> Result:
    """Send a delivery and return how that went; never raises for what the receiver does."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await _post(due, settings, tls, names)
    except TimeoutError:
        return Result(error=f"no answer within {DEADLINE_S:g} s")
    except resolving.NotPublic:
        return Result(error=_REFUSED)
    except resolving.Unresolved:
        return Result(error="the host's name cannot be resolved")
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, OSError) as error:
        return Result(error=f"no answer: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """Return the kind of the fault: its text may repeat what the receiver sent."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "the certificate was not accepted"
        cause = cause.__cause__ or cause.__context__
    return {"ConnectError": "the connection was refused", "ReadError": "the connection broke"}.get(
        type(error).__name__, type(error).__name__
    )


async def _post(due: Due, settings: Settings, tls: ssl.SSLContext, names: Executor) -> Result:
    parts = urlsplit(due.url)
    host, port = (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    address = await loop.run_in_executor(names, resolving.public_address, host, port, settings)
    if parts.scheme != "https" and not addresses.listed(address, settings):
        raise resolving.NotPublic("plain http leads out of the operator's networks")
    body = due.body.encode()
    headers = signing.headers(due.secrets, due.id, int(time.time()), body) | {
        "host": parts.netloc,
        "content-type": "application/json",
        "user-agent": "Tunery-Webhooks",
    }
    # A client of its own, whose connection nobody shares: it is known by its address, and names may share one.
    async with httpx2.AsyncClient(verify=tls, trust_env=False, timeout=DEADLINE_S, follow_redirects=False) as client:
        # The address is connected to, the name is what TLS checks.
        url, names_host = _at(parts, address, port), {"sni_hostname": host}
        async with client.stream("POST", url, content=body, headers=headers, extensions=names_host) as response:
            return _result(response)


def _at(parts: SplitResult, address: Address, port: int) -> str:
    place = f"[{address}]" if isinstance(address, ipaddress.IPv6Address) else str(address)
    return parts._replace(netloc=f"{place}:{port}").geturl()


def _result(response: httpx2.Response) -> Result:
    status = response.status_code
    if 200 <= status < 300:
        return Result(status)
    if response.is_redirect:
        return Result(status, "the receiver redirects, which is not followed")
    asked_s = retry_after_s(response.headers.get("retry-after")) if status in (429, 503) else None
    return Result(status, f"the receiver answered {status}", min(asked_s or 0.0, _RETRY_AFTER_MAX_S))
