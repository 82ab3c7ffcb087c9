"""Who calls: a Bearer key, looked up by its hash before anything of the request's body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from api.limits import is_form
from api.naming import check_names, known_parameters
from common.keyring import bearer_key

bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="`Authorization: Bearer <key>`")


class AuthenticatedRoute(APIRoute):
    """A route that knows its caller before it reads a body: strangers make it neither parse nor store anything."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the check in front."""
        handler = super().get_route_handler()
        known = known_parameters(self)
        takes_json = self.body_field is not None

        async def authenticated(request: Request) -> Response:
            key = bearer_key(request.headers.get("authorization", ""))
            request.state.caller = await run_in_threadpool(request.app.state.keyring.identify, key)
            check_names(request, known)
            if takes_json and is_form(request.headers.get("content-type", "")):
                # Forms may be as long as an upload, which is written to a file; JSON is read into memory.
                raise RequestValidationError([], body=b"")
            return await handler(request)

        return authenticated
