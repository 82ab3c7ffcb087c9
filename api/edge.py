"""The outermost layer: a request id, one line in the log, and an answer where nobody else gave one."""

from __future__ import annotations

import json
import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import problems
from common.ids import new_id

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_access = logging.getLogger("api.access")
_log = logging.getLogger(__name__)


class Edge:
    """ASGI layer around the application."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, send)
        try:
            await self._app(scope, receive, request.send)
        except Exception:
            _log.exception("request %s failed", request.id)
            if request.status:
                # The answer had begun: cutting it off is the only way left to say that it is not whole.
                raise
            await self._fail(scope, receive, request)
        finally:
            request.log()

    @staticmethod
    async def _fail(scope: Scope, receive: Receive, request: _Request) -> None:
        answer = problems.response(
            scope,
            500,
            "the server failed at this request",
            code="internal_error",
            hint="Tell the operator the request id; the server's log has the cause.",
        )
        await answer(scope, receive, request.send)


class _Request:
    def __init__(self, scope: Scope, send: Send):
        self.id = _incoming_id(scope) or new_id("req")
        self.status = 0
        self._scope = scope
        self._send = send
        self._began = time.perf_counter()
        scope.setdefault("state", {})["request_id"] = self.id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.id.encode())]}
        await self._send(message)

    def log(self) -> None:
        # The path without the query, and no header: neither may carry a key into the log.
        caller = self._scope["state"].get("caller")
        line = {
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status,
            "ms": round((time.perf_counter() - self._began) * 1000, 1),
            "request_id": self.id,
            "tenant": caller.tenant if caller else None,
            "key": caller.key_id if caller else None,
        }
        _access.info("%s", json.dumps(line))


def _incoming_id(scope: Scope) -> str | None:
    """Return the caller's own request id, if it is a harmless one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if _REQUEST_ID.fullmatch(text) else None
    return None
