"""A local file as the body of an upload: opened anew for each attempt, and counted as it leaves."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput

Progress = Callable[[str, int, int], None]
"""Told (name, bytes so far, bytes in all) as a file is sent or fetched."""


@dataclass(frozen=True)
class FileBody:
    """The multipart field `file` with the content of `path`."""

    path: Path
    name: str
    on_progress: Progress | None = None

    @contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Open the file and yield httpx2's `files` argument."""
        with _Counted(io.FileIO(self.path), self.name, self.on_progress) as stream:
            yield {"file": (self.name, stream, "application/octet-stream")}


def file_body(path: Path, name: str | None, on_progress: Progress | None) -> FileBody:
    """Return the upload of `path` under its own name or the one given; raises what `check_file` does."""
    check_file(path)
    return FileBody(path, name or path.name, on_progress)


def check_file(path: Path, param: str = "dataset") -> None:
    """Raise InvalidInput, naming `param`, unless there is a file at `path` with something in it."""
    hint = "give the path of a JSONL, JSON, CSV or Parquet file"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InvalidInput(f"{path} {what}", code="no_such_file", param=param, hint=hint)
    try:
        with path.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", code="unreadable_file", param=param) from error
    if empty:
        raise InvalidInput(f"{path} is empty", code="empty_file", param=param, hint=hint)


class _Counted(io.BufferedReader):
    def __init__(self, raw: io.FileIO, name: str, on_progress: Progress | None):
        super().__init__(raw)
        self._name_sent = name
        self._total = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        self._on_progress = on_progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self._on_progress is not None:
            self._on_progress(self._name_sent, self.tell(), self._total)
        return data
