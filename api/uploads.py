"""Reads a file in a multipart form from the network to the disk: counted, hashed and bounded as it comes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from common.errors import InvalidInput, TooLarge

_NAME_MAX = 255
_HEADER_BYTES = 8192
_TEXT_BYTES = 512
# RFC 2046, 5.1.1.
_BOUNDARY_MAX = 70
_WRITE_BYTES = 2**20
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Upload:
    """A received file: its plain name, size in bytes and SHA-256, and the texts that came with it."""

    name: str
    bytes: int
    sha256: str
    texts: dict[str, str] = field(default_factory=dict)


async def receive(
    request: Request, path: Path, limit_bytes: int, *, name: str = "file", texts: Collection[str] = ()
) -> Upload:
    """Write the file in the field `name` of the request to `path`. The fields `texts` may come with it.

    Raises:
        InvalidInput: the body is not such a form, or the file is empty.
        TooLarge: the file is longer than `limit_bytes`.
    """
    form = _Form(name, texts, limit_bytes)
    boundary = _boundary(request, form)
    buffer = bytearray()
    receiver = _Receiver(path, form, boundary)
    try:
        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= _WRITE_BYTES:
                await run_in_threadpool(receiver.feed, bytes(buffer))
                buffer.clear()
        await run_in_threadpool(receiver.feed, bytes(buffer))
        return receiver.finish()
    except FormParserError as error:
        raise form.refusal(f"the form cannot be read ({error})") from error
    except ClientDisconnect as error:
        raise InvalidInput("the upload broke off", code="upload_broken", param=name) from error
    finally:
        receiver.close()


@dataclass(frozen=True)
class _Form:
    # What may stand in a form: the field of the file, and those of texts.

    file: str
    texts: Collection[str]
    limit_bytes: int

    def refusal(self, message: str, code: str = "invalid_form", param: str | None = None) -> InvalidInput:
        """Return the error of a form that is not as it should be."""
        hint = f"Send multipart/form-data with a file in the field `{self.file}`, as `curl -F {self.file}=@…` does."
        return InvalidInput(message, code=code, param=param or self.file, hint=hint)


def _boundary(request: Request, form: _Form) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= _BOUNDARY_MAX:
        raise form.refusal("the body is no multipart form")
    return boundary


class _Receiver:
    """What the parser calls back: one file, and short texts."""

    def __init__(self, path: Path, form: _Form, boundary: bytes):
        self._form = form
        self._hash = hashlib.sha256()
        self._size = 0
        self._name: str | None = None
        self._texts: dict[str, bytearray] = {}
        self._text: bytearray | None = None
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
                "on_part_data": lambda data, start, end: self._data(data[start:end]),
                "on_end": self._end,
            },
        )
        self._out = path.open("wb")

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form."""
        self._parser.write(data)

    def finish(self) -> Upload:
        """Return what was received; raises InvalidInput if it is not a whole, filled file."""
        file = self._form.file
        if self._name is None:
            raise self._form.refusal(f"the form has no field `{file}`", "missing_file")
        if not self._ended:
            raise self._form.refusal("the form ends in the middle")
        if self._size == 0:
            raise InvalidInput(
                f"{file}: the file is empty", code="empty_file", param=file, hint="Send a file with rows."
            )
        self._out.flush()
        texts = {name: text.decode("utf-8", "replace") for name, text in self._texts.items()}
        return Upload(self._name, self._size, self._hash.hexdigest(), texts)

    def close(self) -> None:
        """Close the file."""
        self._out.close()

    def _collect(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > _HEADER_BYTES:
            raise self._form.refusal("a header of the form is too long")

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._headers[name.lower()] = value
        for part in self._header:
            part.clear()

    def _part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != self._form.file:
            self._begin_text(name)
            return
        if self._name is not None:
            raise self._form.refusal("the form has more than one file")
        self._text = None
        self._name = plain_name(options.get(b"filename", b"").decode("utf-8", "replace"))

    def _begin_text(self, name: str) -> None:
        if name not in self._form.texts:
            raise self._form.refusal(f"the form has an unknown field {name[:64]!r}", "unknown_field", name[:64])
        if name in self._texts:
            raise self._form.refusal(f"the form has the field {name!r} twice", param=name)
        self._text = self._texts[name] = bytearray()

    def _data(self, data: bytes) -> None:
        if self._text is None:
            self._file_data(data)
        elif len(self._text) + len(data) > _TEXT_BYTES:
            raise self._form.refusal(f"a text of the form is longer than {_TEXT_BYTES} bytes")
        else:
            self._text += data

    def _file_data(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._form.limit_bytes:
            raise TooLarge(
                f"{self._form.file}: longer than {self._form.limit_bytes} bytes",
                param=self._form.file,
                hint="Split it, use an s3:// or https:// URI, or ask the operator about TUNERY_MAX_UPLOAD_BYTES.",
            )
        self._hash.update(data)
        self._out.write(data)

    def _end(self) -> None:
        self._ended = True


def plain_name(sent: str) -> str:
    """Return the last part of a file name, without what could mean something else to a file system or a terminal."""
    name = re.split(r"[/\\]", sent)[-1]
    return _CONTROL.sub("", name).strip()[-_NAME_MAX:] or "upload"
