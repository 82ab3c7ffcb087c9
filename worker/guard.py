"""Fetching a dataset by HTTPS without being used against the operator's own network.

A name is resolved once; every address that it has must be public (or in the operator's list of networks); the
connection goes to that very address, while TLS still checks the name; each redirect is checked from the start.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import urllib3

from common.addresses import Address
from common.errors import InvalidInput, SourceAway, SourceRefused, TooLarge
from common.settings import Settings
from worker import resolving
from worker.patience import Patience

_REDIRECTS_MAX = 5
_CHUNK_BYTES = 1 << 20
_PARAM = "dataset"
_BROKEN_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


def download(url: str, path: Path, settings: Settings, alive: Callable[[], None]) -> str:
    """Write the content behind `url` to `path` and return the last URL of the redirects.

    Args:
        alive: called at each chunk, and a few times a second by another thread; what it raises ends the download.

    Raises:
        InvalidInput: the address is not allowed, or the server answers with a refusal.
        TooLarge: more than `max_dataset_bytes`.
        SourceAway: the server cannot be reached, or fails.
        SourceSlow: it sends less than anybody should wait for.
    """
    with Patience(f"the host {urlsplit(url).hostname!r}", alive, _PARAM) as patience:
        try:
            return _follow(url, path, settings, patience)
        except ValueError as error:
            raise InvalidInput(
                f"{_PARAM}: an address on the way is malformed ({error})",
                param=_PARAM,
                code="dataset_redirects",
                hint="Give the address that the redirects lead to.",
            ) from error


def _follow(url: str, path: Path, settings: Settings, patience: Patience) -> str:
    for _ in range(_REDIRECTS_MAX + 1):
        response = _get(url, settings, patience)
        try:
            target = response.get_redirect_location()
            if not target:
                _save(response, path, settings, patience)
                return url
            url = urljoin(url, target)
        finally:
            response.close()
    raise InvalidInput(
        f"{_PARAM}: more than {_REDIRECTS_MAX} redirects",
        param=_PARAM,
        code="dataset_redirects",
        hint="Give the address that the redirects lead to.",
    )


def public_address(host: str, port: int, settings: Settings) -> Address:
    """Return an address of the dataset's host that may be connected to.

    Raises:
        InvalidInput: one of its addresses is private, loopback, link-local, multicast or reserved.
        SourceRefused: there is no such name.
        SourceAway: the name cannot be resolved now.
    """
    try:
        return resolving.public_address(host, port, settings)
    except resolving.NotPublic as error:
        raise InvalidInput(
            f"{_PARAM}: {error.message}",
            param=_PARAM,
            code=error.code,
            hint="Upload the file with POST /datasets, or ask the operator to list the network in "
            "TUNERY_FETCH_NETWORKS.",
        ) from error
    except resolving.Unresolved as error:
        raise (SourceRefused if isinstance(error, resolving.NoSuchName) else SourceAway)(
            f"{_PARAM}: {error.message}", param=_PARAM, code="dataset_host_unknown", hint="Check its spelling."
        ) from error


def _get(url: str, settings: Settings, patience: Patience) -> urllib3.BaseHTTPResponse:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise InvalidInput(
            f"{_PARAM}: {parts.scheme or 'no scheme'} is not fetched, only https",
            param=_PARAM,
            code="dataset_scheme",
            hint="Use an https:// address.",
        )
    host, port = parts.hostname, parts.port or 443
    address = public_address(host, port, settings)
    pool = urllib3.HTTPSConnectionPool(
        str(address),
        port,
        server_hostname=host,
        assert_hostname=host,
        cert_reqs="CERT_REQUIRED",
        ca_certs=str(settings.ca_bundle) if settings.ca_bundle else None,
        timeout=urllib3.Timeout(connect=10, read=60),
        retries=False,
        maxsize=1,
    )
    pool.ConnectionCls = _watched(patience)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Host": parts.netloc.rpartition("@")[2], "Accept-Encoding": "identity", "User-Agent": "tunery"}
    try:
        return pool.urlopen("GET", target, headers=headers, redirect=False, preload_content=False)
    except urllib3.exceptions.HTTPError as error:
        # A handshake that breaks off is an SSLError too, and says nothing of the server's certificate.
        if not isinstance(error, urllib3.exceptions.SSLError) or isinstance(error.args[0], _BROKEN_OFF):
            raise _away(f"the host {host!r} does not answer") from error
        raise InvalidInput(
            f"{_PARAM}: the certificate of {host!r} was not accepted",
            param=_PARAM,
            code="dataset_certificate",
            hint="Ask the operator about TUNERY_CA_BUNDLE.",
        ) from error


def _watched(patience: Patience) -> type[urllib3.connection.HTTPSConnection]:
    class Watched(urllib3.connection.HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            opened = super()._new_conn()
            patience.watch(opened)
            return opened

    return Watched


def _away(what: str) -> SourceAway:
    return SourceAway(
        f"{_PARAM}: {what}",
        param=_PARAM,
        code="dataset_host_away",
        hint="Submit the job again once it answers, or upload the file with POST /datasets.",
    )


def _save(response: urllib3.BaseHTTPResponse, path: Path, settings: Settings, patience: Patience) -> None:
    if response.status >= 500 or response.status == 429:
        raise _away(f"the server answers {response.status}")
    if response.status != 200:
        raise InvalidInput(
            f"{_PARAM}: the server answers {response.status}",
            param=_PARAM,
            code="dataset_unreachable",
            hint="Open the address without being logged in; a signed link may have ended.",
        )
    try:
        with path.open("wb") as file:
            # Not stream(), which waits for a chunk to be full.
            while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
                patience.took(len(chunk))
                if patience.received > settings.max_dataset_bytes:
                    raise TooLarge(
                        f"{_PARAM}: more than {settings.max_dataset_bytes} bytes",
                        param=_PARAM,
                        hint="Split it, or ask the operator about TUNERY_MAX_DATASET_BYTES.",
                    )
                file.write(chunk)
    except urllib3.exceptions.HTTPError as error:
        raise _away("the download broke off") from error
