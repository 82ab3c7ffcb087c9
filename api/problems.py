"""Errors as they are sent: RFC 9457 problem documents, and under `/v1` the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"
_OPENAI = "/v1/"


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


class OpenAIErrorBody(BaseModel):
    """What went wrong, in OpenAI's words. `code` is the same stable word as elsewhere in this API."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error as OpenAI's clients read it."""

    error: OpenAIErrorBody


def response(
    scope: Scope,
    status: int,
    detail: str,
    *,
    code: str,
    param: str | None = None,
    hint: str | None = None,
    errors: Sequence[FieldProblem] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the answer to the request of `scope`, in the form that the clients of its path read."""
    problem = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=_sendable(detail),
        code=code,
        param=None if param is None else _sendable(param),
        hint=hint,
        request_id=scope.get("state", {}).get("request_id"),
        errors=None if errors is None else list(errors),
    )
    if scope["path"].startswith(_OPENAI):
        return _as_openai(problem, dict(headers or {}))
    return Response(problem.model_dump_json(exclude_none=True), status, dict(headers or {}), media_type=MEDIA_TYPE)


def _as_openai(problem: Problem, headers: dict[str, str]) -> Response:
    # Their clients know no hints and no lists, and repeat every 409: theirs is 400.
    status = 400 if problem.status == 409 else problem.status
    kind = {429: "rate_limit_error", 503: "server_error", 500: "server_error"}.get(status, "invalid_request_error")
    texts = [f"{each.param or 'the body'}: {each.message}" for each in problem.errors or ()] or [problem.detail]
    message = ". ".join(["; ".join(texts), *([problem.hint] if problem.hint else [])])
    code = "invalid_api_key" if status == 401 else problem.code
    body = OpenAIErrorBody(message=_sendable(message), type=kind, param=problem.param, code=code)
    return JSONResponse(OpenAIError(error=body).model_dump(), status, headers)


def _sendable(text: str) -> str:
    """Return `text` without lone surrogates, which a user may have sent and UTF-8 does not know, and bounded."""
    return text.encode("utf-8", "backslashreplace").decode()[:2000]
