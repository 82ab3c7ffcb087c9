"""Folders of files that can be made again, kept on a machine's disk within bounds. Standard library only.

Many processes use the folder at once, and any of them may be killed at any moment. An entry is written under another
name and renamed into place; whoever reads it holds a shared lock on its manifest, and only one that nobody reads is
removed. Nothing is synced to the disk: what a power cut leaves of an entry does not match its manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MANIFEST = "manifest.json"
_NEW, _GONE = ".new-", ".gone-"
_MANIFEST_BYTES = 16 << 20
_HASHERS = 4
# Between the making of a folder and the lock in it, nobody can tell that its writer lives.
_UNLOCKED_S = 3600


class BadEntry(Exception):
    """An entry is not what was written; the message says in which way."""


class NoRoom(Exception):
    """An entry does not fit into the bounds of the cache; the message says into which."""


@dataclass(frozen=True)
class Entry:
    """An entry that is being read: its folder, and `facts`, which its writer noted about it."""

    path: Path
    facts: dict[str, Any]
    _files: dict[str, tuple[int, str]]

    @contextmanager
    def verified(self) -> Iterator[None]:
        """Compare each file with its hash while the caller reads the files.

        Raises:
            BadEntry: a file is not what was written; what was read of it is worth nothing.
        """
        if {path.name for path in self.path.iterdir()} != {MANIFEST, *self._files}:
            raise BadEntry("its files are not those of its manifest")
        for name, (known, _) in self._files.items():
            if (size := (self.path / name).stat().st_size) != known:
                raise BadEntry(f"{name} has {size:,} bytes, not {known:,}")
        with ThreadPoolExecutor(_HASHERS) as pool:
            found = {name: pool.submit(_sha256, self.path / name) for name in self._files}
            yield
            self._compare(found)

    def _compare(self, found: dict[str, Future[str]]) -> None:
        for name, digest in found.items():
            if digest.result() != self._files[name][1]:
                raise BadEntry(f"the content of {name} has changed")


class Cache:
    """The entries in `folder`: at most `most_bytes` together, and none that leaves the disk less than a reserve."""

    def __init__(self, folder: Path, most_bytes: int, reserve_bytes: int):
        self._folder = folder
        self._most = most_bytes
        self._reserve = reserve_bytes

    @contextmanager
    def reading(self, key: str) -> Iterator[Entry | None]:
        """Yield the entry of `key`, which stays while it is read; None if there is none.

        Raises:
            BadEntry: what lies there has no manifest that can be read.
        """
        path = self._folder / key
        with ExitStack() as opened:
            # The folder first: one that is put into place meanwhile has its manifest.
            if not path.exists():
                yield None
                return
            try:
                stream = opened.enter_context((path / MANIFEST).open("rb"))
            except OSError as error:
                if not path.exists():
                    yield None
                    return
                raise BadEntry(f"its manifest cannot be opened: {error.strerror}") from error
            fcntl.flock(stream, fcntl.LOCK_SH)
            if not _is_at(stream, path / MANIFEST):
                yield None  # it was removed meanwhile
                return
            entry = _entry(path, stream, key)
            os.utime(stream.fileno())
            yield entry

    def has(self, key: str) -> bool:
        """Return whether there is an entry of `key`."""
        return (self._folder / key / MANIFEST).exists()

    def drop(self, key: str) -> None:
        """Remove the entry of `key` even if others read it: it is worth nothing to them."""
        self._remove(self._folder / key)

    def add(self, key: str, num_bytes: int, fill: Callable[[Path], dict[str, Any]]) -> int:
        """Let `fill` write an entry of about `num_bytes` into an empty folder, and put it into place.

        Args:
            fill: returns what is worth knowing about the entry besides its files.

        Returns:
            The bytes of the entry; 0 if somebody else put the same one into place meanwhile.

        Raises:
            NoRoom: there is no room for it, or not in time.
            Any error of `fill` and of the disk, which leaves nothing behind.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self.make_room(num_bytes)
        made, stream = self._begin()
        try:
            with stream:
                size = _finish(made, stream, key, fill(made))
                try:
                    made.rename(self._folder / key)
                except OSError:
                    if not self.has(key):
                        raise
                    return 0  # a folder does not replace one that has files: the first of two writers wins
                return size
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _begin(self) -> tuple[Path, IO[bytes]]:
        """Make a folder and lock it; another writer may clear it between the two, since it looks abandoned then."""
        while True:
            made = self._folder / f"{_NEW}{secrets.token_hex(8)}"
            made.mkdir()
            with ExitStack() as opened, suppress(FileNotFoundError):
                stream = opened.enter_context((made / MANIFEST).open("wb"))
                fcntl.flock(stream, fcntl.LOCK_EX)
                if _is_at(stream, made / MANIFEST):
                    opened.pop_all()
                    return made, stream

    def make_room(self, num_bytes: int = 0) -> None:
        """Remove what dead processes left, and entries, the longest unused first, until `num_bytes` more fit.

        Raises:
            NoRoom: they do not fit even then, or what is in use is in the way.
        """
        if not self._folder.is_dir():
            return
        self._clear_abandoned()
        while reason := self._excess(num_bytes):
            if num_bytes > self._most or not self._evict():
                raise NoRoom(reason)

    def _evict(self) -> bool:
        oldest = sorted(self._entries(), key=_used_at)
        return any(self._remove(path, unless_in_use=True) for path in oldest)

    def _excess(self, num_bytes: int) -> str | None:
        if sum(map(_size, self._entries())) + num_bytes > self._most:
            return f"{num_bytes:,} bytes more than the cache may hold, {self._most:,}"
        if shutil.disk_usage(self._folder).free - num_bytes < self._reserve:
            return f"{num_bytes:,} bytes would leave the disk less than its reserve of {self._reserve:,}"
        return None

    def _entries(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if not path.name.startswith((_NEW, _GONE))]

    def _clear_abandoned(self) -> None:
        for path in self._folder.glob(f"{_GONE}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(f"{_NEW}*"):
            with suppress(OSError):
                if (path / MANIFEST).exists() or time.time() - path.stat().st_mtime > _UNLOCKED_S:
                    self._remove(path, unless_in_use=True)

    def _remove(self, path: Path, *, unless_in_use: bool = False) -> bool:
        """Remove a folder; return whether it is gone."""
        with ExitStack() as opened:
            with suppress(FileNotFoundError, NotADirectoryError):
                stream = opened.enter_context((path / MANIFEST).open("rb"))
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if unless_in_use:
                        return False
            gone = self._folder / f"{_GONE}{secrets.token_hex(8)}"
            with suppress(FileNotFoundError):
                path.rename(gone)
        if gone.is_dir():
            shutil.rmtree(gone, ignore_errors=True)
        else:
            gone.unlink(missing_ok=True)
        return True


def _entry(path: Path, stream: IO[bytes], key: str) -> Entry:
    try:
        values = json.loads(stream.read(_MANIFEST_BYTES))
        files = {str(name): (int(known["bytes"]), str(known["sha256"])) for name, known in values["files"].items()}
        entry = Entry(path, dict(values["facts"]), files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadEntry(f"its manifest is broken ({type(error).__name__})") from error
    if values.get("key") != key:
        raise BadEntry("its manifest is that of another entry")
    return entry


def _finish(folder: Path, stream: IO[bytes], key: str, facts: dict[str, Any]) -> int:
    """Write the manifest of what lies in `folder` into `stream`, and return the bytes of all."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    with ThreadPoolExecutor(_HASHERS) as pool:
        digests = list(pool.map(_sha256, paths))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)
    }
    stream.write(json.dumps({"key": key, "facts": facts, "files": files}, indent=1).encode())
    stream.flush()
    return _size(folder)


def _is_at(stream: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:
        return False


def _used_at(path: Path) -> int:
    try:
        return (path / MANIFEST).stat().st_mtime_ns
    except OSError:
        return 0


def _size(path: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in path.rglob("*"))
    return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
