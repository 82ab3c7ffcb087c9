"""The one place that knows which HTTP answer an error becomes."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api import problems, validation
from api.problems import FieldProblem
from common import errors
from common.db import refusals
from common.errors import TuneryError

RETRY_AFTER_S = 5
# Longer than clients wait by themselves: whoever is over a quota should hear of it.
QUOTA_RETRY_AFTER_S = 120
_STATUS: tuple[tuple[type[TuneryError], int], ...] = (
    (errors.Unauthenticated, 401),
    (errors.Forbidden, 403),
    (errors.NotFound, 404),
    (errors.WrongState, 409),
    (errors.TooLarge, 413),
    (errors.OverQuota, 429),
    (errors.UserError, 400),
    (errors.InfraError, 503),
    (errors.LeaseLost, 409),
)
_log = logging.getLogger(__name__)


class BadBody(RequestValidationError):
    """A body that was found wrong after it was read as JSON: as a `model`, together with what was there already."""

    def __init__(self, error: ValidationError, body: Any, model: type[BaseModel]):
        super().__init__([{**item, "loc": ("body", *item["loc"])} for item in error.errors()], body=body)
        self.model = model


def install(app: FastAPI) -> None:
    """Teach `app` to answer every error with a problem document. Unexpected ones end in `api.edge`."""
    app.add_exception_handler(TuneryError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for away in (OperationalError, InterfaceError, ProgrammingError, PoolTimeout):
        app.add_exception_handler(away, _database_away)


def request_id(request: Request) -> str | None:
    """Return the id of the request, as `api.edge` gave it."""
    found: str | None = request.scope.get("state", {}).get("request_id")
    return found


async def _refused(request: Request, error: Any) -> Response:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    if status >= 500:
        _log.warning("request %s: %s", request_id(request), error)
    return problems.response(
        request.scope,
        status,
        error.message,
        code=error.code,
        param=error.param,
        hint=error.hint,
        headers=_headers(status),
    )


def _headers(status: int) -> dict[str, str]:
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    # Clients that repeat every 409 would only hear it again.
    return {
        409: {"x-should-retry": "false"},
        429: {"Retry-After": str(QUOTA_RETRY_AFTER_S)},
        503: {"Retry-After": str(RETRY_AFTER_S)},
    }.get(status, {})


async def _invalid(request: Request, error: Any) -> Response:
    if isinstance(error.body, bytes):
        return problems.response(
            request.scope,
            415,
            "the body is not sent as JSON",
            code="unsupported_media_type",
            hint="Send it with the header Content-Type: application/json.",
        )
    route = request.scope.get("route")
    field = getattr(route, "body_field", None)
    model = error.model if isinstance(error, BadBody) else field.field_info.annotation if field else None
    found = validation.field_problems(error.errors(), error.body, model)
    return _bad_fields(request, found)


def _bad_fields(request: Request, found: list[FieldProblem]) -> Response:
    first = found[0]
    detail = f"{first.param or 'the body'}: {first.message}"
    if len(found) > 1:
        detail += f" (and {len(found) - 1} more; see errors)"
    return problems.response(
        request.scope,
        400,
        detail,
        code="invalid_input",
        param=first.param,
        hint=first.hint,
        errors=found,
    )


_BY_STATUS: dict[int, tuple[str, str, str | None]] = {
    400: ("invalid_body", "the body cannot be read", "Send valid JSON in UTF-8, not too deeply nested."),
    404: ("unknown_route", "there is no such route", "GET /openapi.json lists the routes; /docs shows them."),
    413: (
        "too_large",
        "the body is longer than allowed",
        "Split it; datasets may also be named by an s3:// or https:// URI.",
    ),
    405: ("method_not_allowed", "the route does not know this method", "The header Allow lists those it knows."),
}


async def _http(request: Request, error: Any) -> Response:
    code, detail, hint = _BY_STATUS.get(error.status_code, ("http_error", str(error.detail), None))
    return problems.response(request.scope, error.status_code, detail, code=code, hint=hint, headers=error.headers)


async def _database_away(request: Request, error: Any) -> Response:
    if isinstance(error, ProgrammingError) and not refusals.is_outdated(error):
        raise error  # a mistake of our own
    reason = error.orig if isinstance(error, DBAPIError) else error
    _log.warning("request %s: %s: %s", request_id(request), refusals.told(error), reason)
    return await _refused(request, refusals.told(error))
