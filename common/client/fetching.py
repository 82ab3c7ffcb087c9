"""Fetch one published file from its signed link: verified, resumed where it broke off, never half in place."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import httpx2

from common.client.errors import DownloadFailed, answer_error
from common.client.retries import Retries
from common.client.sending import Progress
from common.schemas.jobs import Artifact

# Signed links answer with one of these when their time is over.
_LINK_OVER = frozenset({400, 401, 403, 404, 410})
_PASSING = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Source:
    """Where files come from, and how patiently. `fresh_link` asks the server for a new link to a file."""

    http: httpx2.Client
    base_url: str
    fresh_link: Callable[[Artifact], str]
    retries: Retries
    sleep: Callable[[float], None]
    on_progress: Progress | None = None


def fetch_file(source: Source, artifact: Artifact, target: Path) -> None:
    """Bring `artifact` to `target`, unless it is there already.

    Raises:
        DownloadFailed: it does not arrive whole, or its SHA-256 differs. What arrived stays for the next try.
    """
    if target.is_file() and _is_whole(target, artifact):
        if source.on_progress is not None:
            source.on_progress(artifact.name, artifact.bytes, artifact.bytes)
        return
    # The name carries the hash, so that no part of another version is continued.
    part = target.with_name(f".{target.name}.{artifact.sha256[:16]}.part")
    for _ in range(2):
        _PartFile(source, artifact, part).fill()
        if _is_whole(part, artifact):
            part.replace(target)
            _sync_folder(target.parent)
            return
        # Perhaps an earlier run left a wrong part: once more from the start.
        part.unlink()
    raise DownloadFailed(
        f"{artifact.name} does not have the SHA-256 that was published",
        code="hash_mismatch",
        hint="the object store or something on the way changed it; try again, then tell the operator",
    )


class _PartFile:
    """A file on its way."""

    def __init__(self, source: Source, artifact: Artifact, path: Path):
        self._source = source
        self._artifact = artifact
        self._url = artifact.url
        self._path = path
        self._relinked = False

    def fill(self) -> None:
        """Bring the part to its full length. What arrived counts: only attempts without a byte use up patience."""
        attempt = 0
        while not self._is_full():
            have = self._size()
            error = self._attempt(have)
            if self._is_full():
                return
            if self._size() > have:
                attempt, self._relinked = 0, False
            attempt += 1
            if attempt >= self._source.retries.limit:
                raise self._failure(error) from error
            self._source.sleep(self._source.retries.pause_s(attempt))

    def _attempt(self, have: int) -> Exception:
        """Read on from byte `have`; return why it ended."""
        try:
            self._read_from(have)
        except httpx2.TransportError as broken:
            return broken
        except OSError as error:
            raise DownloadFailed(
                f"{self._artifact.name} cannot be written to {self._path.parent}: {error.strerror}",
                hint="make room there; what arrived is kept, and the same command goes on from there",
            ) from error
        except _Refused as refused:
            if refused.status in _LINK_OVER and not self._relinked:
                self._relinked, self._url = True, self._source.fresh_link(self._artifact)
            elif refused.status not in _PASSING:
                raise self._failure(refused) from refused
            return refused
        return DownloadFailed("the object store ended it early")

    def _read_from(self, have: int) -> None:
        headers = {"accept-encoding": "identity"} | ({"range": f"bytes={have}-"} if have else {})
        url = urljoin(self._source.base_url + "/", self._url)
        with self._source.http.stream("GET", url, headers=headers) as response:
            if response.status_code >= 400:
                response.read()
                raise _Refused(response)
            # A store that knows no ranges answers 200 and the whole file.
            start = _range_start(response) if response.status_code == 206 else 0
            if start not in (0, have):
                raise self._failure(DownloadFailed("the object store answered another range than was asked"))
            with self._path.open("ab" if start else "wb") as part:
                self._write(response, part.fileno(), start)

    def _write(self, response: httpx2.Response, descriptor: int, done: int) -> None:
        try:
            # Chunks as they come: joined to larger ones, what is buffered when the connection breaks would be lost.
            for chunk in response.iter_bytes():
                if done + len(chunk) > self._artifact.bytes:
                    raise self._failure(DownloadFailed("it is longer than what was published"))
                _write_all(descriptor, chunk)
                done += len(chunk)
                if self._source.on_progress is not None:
                    self._source.on_progress(self._artifact.name, done, self._artifact.bytes)
        finally:
            os.fsync(descriptor)

    def _is_full(self) -> bool:
        return self._path.exists() and self._size() == self._artifact.bytes

    def _size(self) -> int:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size > self._artifact.bytes:
            self._path.unlink()
            return 0
        return size

    def _failure(self, error: Exception) -> DownloadFailed:
        return DownloadFailed(
            f"{self._artifact.name} did not arrive: {str(error) or type(error).__name__}",
            hint="what arrived is kept; the same command goes on from there",
        )


class _Refused(Exception):
    """The store answered with an error."""

    def __init__(self, response: httpx2.Response):
        super().__init__(f"the object store answered {response.status_code}: {answer_error(response).message[:200]}")
        self.status = response.status_code


def _is_whole(path: Path, artifact: Artifact) -> bool:
    return path.stat().st_size == artifact.bytes and sha256_of(path) == artifact.sha256


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _range_start(response: httpx2.Response) -> int:
    """Return the first byte's position in a 206, or -1 where its header says none."""
    match = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    return int(match[1]) if match else -1


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
