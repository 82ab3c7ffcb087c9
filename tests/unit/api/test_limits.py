"""A body is counted as it comes, and a client that sends on after a refusal still hears why."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.limits import JSON_BYTES, BodyLimit, BodyTooLarge


class Exchange:
    """A request in chunks, and what was answered."""

    def __init__(self, chunks: list[bytes], **headers: str):
        self.chunks = chunks
        self.sent: list[dict[str, Any]] = []
        self.scope = {
            "type": "http",
            "path": "/datasets",
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
        }

    async def receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self.chunks.pop(0), "more_body": bool(self.chunks)}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def through(self, app: Any) -> int:
        asyncio.run(BodyLimit(app, upload_bytes=3 * 2**20)(self.scope, self.receive, self.send))
        return int(self.sent[0]["status"])


async def reads_all(_scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def refuses(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": []})


def test_a_body_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    assert Exchange([b"x" * JSON_BYTES]).through(reads_all) == 200
    with pytest.raises(BodyTooLarge):
        Exchange([b"x" * JSON_BYTES, b"x"]).through(reads_all)


def test_uploads_have_their_own_limit() -> None:
    chunks = [b"x" * 2**20] * 3
    assert Exchange(chunks, content_type="multipart/form-data; boundary=x").through(reads_all) == 200


def test_a_length_that_is_too_great_is_refused_before_the_body() -> None:
    exchange = Exchange([b"x"] * 3, content_length=str(JSON_BYTES + 1))
    assert exchange.through(reads_all) == 413
    assert not exchange.chunks, "what is sent is read, so that the client comes to read the answer"


def test_a_client_that_asked_first_is_answered_at_once() -> None:
    exchange = Exchange([b"x"] * 3, content_length=str(10**12), expect="100-continue")
    assert exchange.through(reads_all) == 413 and len(exchange.chunks) == 3


def test_a_refusal_reads_the_rest_first() -> None:
    exchange = Exchange([b"x" * 1000] * 5)
    assert exchange.through(refuses) == 401 and not exchange.chunks
