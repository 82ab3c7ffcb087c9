"""Errors in OpenAI's shape: the one place of this server that knows which HTTP answer an error becomes."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from common import errors
from common.db import refusals
from common.errors import NotFound, TuneryError

RETRY_AFTER_S = 5
_STATUS: tuple[tuple[type[TuneryError], int, str], ...] = (
    (errors.Unauthenticated, 401, "authentication_error"),
    (errors.NotFound, 404, "invalid_request_error"),
    (errors.TooLarge, 413, "invalid_request_error"),
    (errors.UserError, 400, "invalid_request_error"),
    (errors.InfraError, 503, "service_unavailable"),
)
_log = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Teach `app` to answer every error in OpenAI's shape."""
    app.add_exception_handler(TuneryError, _refused)
    app.add_exception_handler(HTTPException, _http)
    for away in (OperationalError, InterfaceError, ProgrammingError, PoolTimeout):
        app.add_exception_handler(away, _database_away)
    app.add_exception_handler(Exception, _failed)


def shape(error: TuneryError) -> dict[str, Any]:
    """Return `error` as the document that OpenAI's clients read. They show the message alone, so it has the hint."""
    _, kind = _status(error)
    message = f"{error.message}. {error.hint}" if error.hint else error.message
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def _status(error: TuneryError) -> tuple[int, str]:
    return next(((code, kind) for cls, code, kind in _STATUS if isinstance(error, cls)), (500, "server_error"))


async def _refused(_request: Request, error: Any) -> JSONResponse:
    status, _ = _status(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_AFTER_S)}}.get(status)
    return JSONResponse(shape(error), status, headers)


async def _http(request: Request, error: Any) -> JSONResponse:
    if error.status_code == 404:
        hint = "There are POST /v1/chat/completions and GET /v1/models."
        return await _refused(request, NotFound("there is no such route", code="unknown_route", hint=hint))
    return JSONResponse(shape(TuneryError(str(error.detail), code="http_error")), error.status_code, error.headers)


async def _database_away(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, ProgrammingError) and not refusals.is_outdated(error):
        return await _failed(request, error)
    _log.warning("%s", refusals.logged(error))
    return await _refused(request, refusals.told(error))


async def _failed(_request: Request, _error: Any) -> JSONResponse:
    return JSONResponse(shape(TuneryError("the server failed at this request", code="internal_error")), 500)
