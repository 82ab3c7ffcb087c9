"""Send a large file straight to the object store: several parts at once, and only those that have not arrived.

Nothing is kept on this machine for that: the server finds the unfinished upload by the hash of the file.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import httpx2

from common.client.calls import CONNECT_TIMEOUT_S, Call, get, segment
from common.client.errors import UnexpectedAnswer, UploadFailed
from common.client.fetching import sha256_of
from common.client.sending import Progress, check_file
from common.client.transport import Transport, trusts_environment
from common.schemas.datasets import Dataset
from common.schemas.uploads import PartLink, PartLinkList, Upload

# Smaller files take fewer steps through the API.
DIRECT_BYTES = 64 * 2**20
_AT_ONCE = 4
# Few enough that the links of a slow line do not end before they are used.
_LINKS_PER_PAGE = 16
_CHUNK_BYTES = 2**18
_SILENCE_S = 60
_VERIFY_S = 20

Resumed = Callable[[int, int], None]
"""Told (bytes that are there, bytes in all) where an upload goes on that was not finished."""


def goes_direct(path: Path, direct: bool | None) -> bool:
    """Return whether a file goes straight to the store: as it is wished, otherwise by its size.

    Raises:
        InvalidInput: there is no file, or it is empty.
    """
    check_file(path)
    return path.stat().st_size >= DIRECT_BYTES if direct is None else direct


def _begin(path: Path, name: str) -> Call[Upload]:
    body = {"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    # Begun twice, it is the same upload.
    return Call("POST", "/uploads", Upload, json=body, repeatable=True)


def _links(upload: str) -> Call[PartLinkList]:
    return get(f"/uploads/{segment(upload)}/parts", PartLinkList, limit=_LINKS_PER_PAGE)


def _complete(upload: str) -> Call[Upload]:
    path = f"/uploads/{segment(upload)}/complete"
    return Call("POST", path, Upload, params={"wait": _VERIFY_S}, repeatable=True)


@dataclass(frozen=True)
class Uploader:
    """Sends files with the patience of `transport`. Progress is told from the threads that send."""

    transport: Transport
    on_progress: Progress | None = None
    on_resume: Resumed | None = None

    def upload(self, path: Path, name: str | None = None) -> Dataset:
        """Upload the file and return its dataset; go on where an earlier call broke off.

        Raises:
            UploadFailed: parts do not arrive. What arrived is kept for the next call.
            RequestInvalid: what arrived is not what the file was at the start; `param` is `sha256`.
        """
        shown = name or path.name
        begin = _begin(path, shown)
        upload = self.transport.send(begin)
        named = upload.name
        there = sum(part.bytes for part in upload.parts)
        if upload.status == "pending" and there and self.on_resume is not None:
            self.on_resume(there, upload.bytes)
        counter = _Counter(shown, upload.bytes, self.on_progress)
        counter.add(there)
        if upload.status == "pending":
            self._send_missing(_File(path, counter), upload.id)
            while upload.status == "pending":
                upload = self.transport.send(_complete(upload.id))
            if upload.name != named:
                # Somebody else began the same content under another name: now that it is there, ours costs nothing.
                upload = self.transport.send(begin)
        if upload.dataset is None:
            raise UnexpectedAnswer(f"the upload {upload.id} is {upload.status}, and there is no dataset")
        return upload.dataset

    def _send_missing(self, file: _File, upload: str) -> None:
        """Send what has not arrived, by the store's own list. Only rounds without a new part use up patience."""
        attempt, accepted = 0, set[int]()
        while links := self.transport.send(_links(upload)).data:
            arrived, error = file.send(links)
            if arrived - accepted:
                attempt = 0
            elif error is None:
                error = UploadFailed("the object store took a part and does not list it")
            accepted |= arrived
            if error is not None:
                attempt += 1
                if attempt >= self.transport.retries.limit:
                    raise _failure(file.path.name, error) from error
                self.transport.sleep(self.transport.retries.pause_s(attempt))


def _failure(name: str, error: Exception) -> UploadFailed:
    hint = "what arrived is kept; the same call goes on from there"
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        hint += ". Links lead to the server's TUNERY_S3_PUBLIC_URL, which this machine must reach"
    return UploadFailed(f"{name} was not sent: {str(error) or type(error).__name__}", hint=hint)


@dataclass
class _Counter:
    """Bytes that are on their way or there, counted by several threads."""

    name: str
    total: int
    on_progress: Progress | None
    _done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self.on_progress is not None:
                self.on_progress(self.name, self._done, self.total)


class _Refused(Exception):
    """The store refused a part. The link has a signature, and some stores repeat it: only their word is shown."""

    def __init__(self, response: httpx2.Response):
        code = re.search(r"<Code>(\w{1,64})</Code>", response.text)
        super().__init__(f"the object store answered {response.status_code}{f' ({code[1]})' if code else ''}")


@dataclass
class _File:
    """A file whose parts are sent."""

    path: Path
    counter: _Counter
    _given_up: threading.Event = field(default_factory=threading.Event)

    def send(self, links: Sequence[PartLink]) -> tuple[set[int], Exception | None]:
        """Send parts; return the numbers of those that the store took, and an error of one that it did not take."""
        wanted, ended = SimpleQueue[PartLink](), SimpleQueue[tuple[int, Exception | None]]()
        for link in links:
            wanted.put(link)
        arrived: set[int] = set()
        error: Exception | None = None
        timeout = httpx2.Timeout(_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        # The links lead to the object store, so this client carries no API key.
        with httpx2.Client(timeout=timeout, trust_env=trusts_environment(links[0].url)) as http:
            for _ in range(min(_AT_ONCE, len(links))):
                # Daemons: Ctrl-C shall not wait for a store that does not answer.
                threading.Thread(target=self._work, args=(http, wanted, ended), daemon=True).start()
            try:
                for _ in links:
                    number, refused = ended.get()
                    if refused is None:
                        arrived.add(number)
                    elif isinstance(refused, httpx2.TransportError | _Refused):
                        error = refused
                    else:
                        raise refused
            except BaseException:
                self._given_up.set()
                raise
        return arrived, error

    def _work(
        self, http: httpx2.Client, wanted: SimpleQueue[PartLink], ended: SimpleQueue[tuple[int, Exception | None]]
    ) -> None:
        while not self._given_up.is_set():
            try:
                link = wanted.get_nowait()
            except Empty:
                return
            try:
                self._put(http, link)
            except Exception as error:  # handed to the thread that waits
                ended.put((link.number, error))
            else:
                ended.put((link.number, None))

    def _put(self, http: httpx2.Client, link: PartLink) -> None:
        # The store compares, so that a part that was changed on its way is not kept.
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in self._chunks(link):
            digest.update(chunk)
        md5 = base64.b64encode(digest.digest()).decode()
        headers = {"content-length": str(link.bytes), "content-md5": md5}
        sent = 0

        def body() -> Iterator[bytes]:
            nonlocal sent
            for chunk in self._chunks(link):
                yield chunk
                sent += len(chunk)
                self.counter.add(len(chunk))

        try:
            response = http.put(link.url, content=body(), headers=headers)
            if response.status_code != 200:
                raise _Refused(response)
        except Exception:
            if not self._given_up.is_set():
                self.counter.add(-sent)
            raise

    def _chunks(self, link: PartLink) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            stream.seek(link.offset)
            left = link.bytes
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise UploadFailed(f"{self.path.name} became shorter while it was sent", code="file_changed")
                if self._given_up.is_set():
                    raise UploadFailed(f"{self.path.name} was given up", code="cancelled")
                left -= len(chunk)
                yield chunk
