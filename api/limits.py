"""How much of a request is read: a cap on the body, and patience with clients that send on after a refusal."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import problems

JSON_BYTES = 2**20
# Around a file of the greatest size there are boundaries and headers.
_MULTIPART_SLACK_BYTES = 2**16
_DRAIN_BYTES = 64 * 2**20
_DRAIN_S = 10.0


class BodyTooLarge(HTTPException):
    """The body is longer than allowed; FastAPI hands on errors of this kind while it reads a body."""

    def __init__(self, limit: int):
        super().__init__(413, f"the body is longer than {limit} bytes")


def is_form(content_type: str) -> bool:
    """Return whether a body of this type is a form with a file, which may be as long as an upload."""
    return content_type.lower().startswith("multipart/form-data")


class BodyLimit:
    """ASGI layer that counts the bytes of a body and refuses too many: 1 MiB, or an upload's own limit."""

    def __init__(self, app: ASGIApp, upload_bytes: int):
        self._app = app
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"]}
        is_upload = is_form(headers.get(b"content-type", b"").decode("latin-1"))
        limit = self._upload_bytes + _MULTIPART_SLACK_BYTES if is_upload else JSON_BYTES
        body = _Body(receive, send, limit, awaits_word=b"100-continue" in headers.get(b"expect", b"").lower())
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            await _refuse(scope, body, limit)
            return
        await self._app(scope, body.receive, body.send)


async def _refuse(scope: Scope, body: _Body, limit: int) -> None:
    answer = problems.response(
        scope,
        413,
        f"the body is longer than {limit} bytes",
        code="too_large",
        hint="Split it; datasets may also be named by an s3:// or https:// URI.",
    )
    await answer(scope, body.receive, body.send)


class _Body:
    """A request's body on its way in, and the answer on its way out."""

    def __init__(self, receive: Receive, send: Send, limit: int, awaits_word: bool):
        self._receive = receive
        self._send = send
        self._limit = limit
        self._awaits_word = awaits_word
        self._read = 0
        self._complete = False

    async def receive(self) -> Message:
        message = await self._next()
        if self._read > self._limit:
            raise BodyTooLarge(self._limit)
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        else:
            self._complete = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            await self._drain()
        await self._send(message)

    async def _drain(self) -> None:
        # A client reads the answer only when it has sent everything; closing before that would lose the reason.
        # One that asked first (Expect: 100-continue) has sent nothing yet.
        if self._complete or (self._awaits_word and not self._read):
            return
        most = self._read + _DRAIN_BYTES
        try:
            async with asyncio.timeout(_DRAIN_S):
                while not self._complete and self._read < most:
                    await self._next()
        except TimeoutError:
            return
