"""Who calls: a Bearer key, looked up by its hash before anything of the request's body is read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from api.naming import check_names, known_parameters
from common import keys
from common.context import Context
from common.errors import Unauthenticated
from common.keys import Caller

_TOUCH_S = 60.0
_KEY_MAX = 512
_log = logging.getLogger(__name__)

bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="`Authorization: Bearer <key>`")


class AuthenticatedRoute(APIRoute):
    """A route that knows its caller before it reads a body: strangers make it neither parse nor store anything."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the check in front."""
        handler = super().get_route_handler()
        known = known_parameters(self)

        async def authenticated(request: Request) -> Response:
            key = _sent_key(request)
            request.state.caller = await run_in_threadpool(request.app.state.keyring.identify, key)
            check_names(request, known)
            return await handler(request)

        return authenticated


class Keyring:
    """Looks keys up, and notes their use once a minute."""

    def __init__(self, context: Context):
        self._context = context
        self._touched: dict[str, float] = {}

    def identify(self, key: str) -> Caller:
        """Return who holds `key`; raises Unauthenticated."""
        with self._context.read() as session:
            who = keys.identify(session, key)
        self._note_use(who.key_id)
        return who

    def _note_use(self, key_id: str) -> None:
        now = time.monotonic()
        if now - self._touched.get(key_id, -_TOUCH_S) < _TOUCH_S:
            return
        self._touched[key_id] = now
        try:
            with self._context.sessions.write() as session:
                keys.touch(session, key_id)
        except SQLAlchemyError as error:
            _log.warning("the use of key %s was not noted: %s", key_id, error)


def _sent_key(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key or len(key) > _KEY_MAX:
        raise Unauthenticated(
            "no API key was sent",
            hint="Send `Authorization: Bearer <key>`; `tunery keys create` makes one.",
        )
    return key
