"""Errors as they are sent: RFC 9457 problem documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from pydantic import BaseModel
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


class FieldProblem(BaseModel):
    """One thing that is wrong with a request: `param` is the dotted path of the field."""

    param: str | None = None
    message: str
    hint: str | None = None


class Problem(BaseModel):
    """What went wrong. `code` is a stable word for programs, `hint` says what to do, `errors` lists every problem."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    param: str | None = None
    hint: str | None = None
    request_id: str | None = None
    errors: list[FieldProblem] | None = None


def response(
    status: int,
    detail: str,
    *,
    code: str,
    param: str | None = None,
    hint: str | None = None,
    request_id: str | None = None,
    errors: Sequence[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the response with the problem document."""
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=_sendable(detail),
        code=code,
        param=None if param is None else _sendable(param),
        hint=hint,
        request_id=request_id,
        errors=None if errors is None else list(errors),
    )
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, status, dict(headers or {}), media_type=MEDIA_TYPE)


def _sendable(text: str) -> str:
    """Return `text` without lone surrogates, which a user may have sent and UTF-8 does not know, and bounded."""
    return text.encode("utf-8", "backslashreplace").decode()[:2000]
