"""Reads the multipart field `file` from the network into a file: counted, hashed and bounded as it comes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from common.errors import InvalidInput, TooLarge

_FIELD = "file"
_NAME_MAX = 255
_HEADER_BYTES = 8192
# RFC 2046, 5.1.1.
_BOUNDARY_MAX = 70
_WRITE_BYTES = 2**20
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HINT = "Send multipart/form-data with one field `file`, as `curl -F file=@train.jsonl` does."


@dataclass(frozen=True)
class Upload:
    """A received file: its plain name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


async def receive(request: Request, path: Path, limit_bytes: int) -> Upload:
    """Write the field `file` of the request to `path`.

    Raises:
        InvalidInput: the body is not such a form, or the file is empty.
        TooLarge: the file is longer than `limit_bytes`.
    """
    boundary = _boundary(request)
    buffer = bytearray()
    receiver = _Receiver(path, limit_bytes, boundary)
    try:
        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= _WRITE_BYTES:
                await run_in_threadpool(receiver.feed, bytes(buffer))
                buffer.clear()
        await run_in_threadpool(receiver.feed, bytes(buffer))
        return receiver.finish()
    except FormParserError as error:
        raise InvalidInput(f"the form cannot be read ({error})", code="invalid_form", hint=_HINT) from error
    except ClientDisconnect as error:
        raise InvalidInput("the upload broke off", code="upload_broken", param=_FIELD) from error
    finally:
        receiver.close()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= _BOUNDARY_MAX:
        raise InvalidInput("the body is no multipart form", code="invalid_form", param=_FIELD, hint=_HINT)
    return boundary


class _Receiver:
    """What the parser calls back: one part named `file`, and nothing else."""

    def __init__(self, path: Path, limit_bytes: int, boundary: bytes):
        self._limit = limit_bytes
        self._hash = hashlib.sha256()
        self._size = 0
        self._name: str | None = None
        self._headers: dict[bytes, bytes] = {}
        self._header = [bytearray(), bytearray()]
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_field": lambda data, start, end: self._collect(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._collect(1, data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._part,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )
        self._out = path.open("wb")

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form."""
        self._parser.write(data)

    def finish(self) -> Upload:
        """Return what was received; raises InvalidInput if it is not a whole, filled file."""
        if self._name is None:
            raise InvalidInput(f"the form has no field `{_FIELD}`", code="missing_file", param=_FIELD, hint=_HINT)
        if not self._ended:
            raise InvalidInput("the form ends in the middle", code="invalid_form", param=_FIELD, hint=_HINT)
        if self._size == 0:
            raise InvalidInput(
                f"{_FIELD}: the file is empty", code="empty_file", param=_FIELD, hint="Send a file with rows."
            )
        self._out.flush()
        return Upload(self._name, self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._out.close()

    def _collect(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > _HEADER_BYTES:
            raise InvalidInput("a header of the form is too long", code="invalid_form", param=_FIELD, hint=_HINT)

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._headers[name.lower()] = value
        for part in self._header:
            part.clear()

    def _part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field != _FIELD:
            raise InvalidInput(
                f"the form has an unknown field {field[:64]!r}", code="unknown_field", param=field[:64], hint=_HINT
            )
        if self._name is not None:
            raise InvalidInput("the form has more than one file", code="invalid_form", param=_FIELD, hint=_HINT)
        self._name = _plain_name(options.get(b"filename", b""))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > self._limit:
            raise TooLarge(
                f"{_FIELD}: longer than {self._limit} bytes",
                param=_FIELD,
                hint="Split it, use an s3:// or https:// URI, or ask the operator about TUNERY_MAX_UPLOAD_BYTES.",
            )
        self._hash.update(data[start:end])
        self._out.write(data[start:end])

    def _end(self) -> None:
        self._ended = True


def _plain_name(raw: bytes) -> str:
    """Return the last part of a file name, without what could mean something else to a file system or a terminal."""
    name = re.split(r"[/\\]", raw.decode("utf-8", "replace"))[-1]
    return _CONTROL.sub("", name).strip()[-_NAME_MAX:] or "upload"
