"""The interactive documentation at `/docs`, from vendored files: it works without internet. And what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from api.problems import MEDIA_TYPE, OpenAIError, Problem

_VENDOR = Path(__file__).parent / "ui" / "vendor"
_FILES = "/docs/files"

# The schema of a field that takes a file.
FILE = {"type": "string", "format": "binary", "minLength": 1}

_MEANINGS = {
    400: "The request is wrong; `param` names the field, `hint` says what to do.",
    401: "No API key, or one that is not known.",
    403: "The key may not do this.",
    404: "There is no such thing in the tenant of the key.",
    409: "That cannot be done in the present state.",
    413: "The body is longer than allowed.",
    415: "The body has another media type.",
    429: "The tenant is at its quota; try again after Retry-After.",
    503: "A part of the installation is away; try again after Retry-After.",
}


def problem_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what `responses=` takes, for answers that are problem documents."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": _MEANINGS[status], "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses
    }


def openai_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what `responses=` takes, for answers that are errors in OpenAI's form."""
    return {status: {"description": _MEANINGS[status], "model": OpenAIError} for status in statuses}


def form(fields: dict[str, dict[str, Any]], *, required: list[str]) -> dict[str, Any]:
    """Return what `openapi_extra=` takes, for a body that is a multipart form of these fields, by their schemas.

    Forms with files are read piece by piece from the request, so that FastAPI cannot describe them by itself.
    """
    schema = {"type": "object", "required": required, "properties": fields, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def install(app: FastAPI) -> None:
    """Serve `/docs` and its files, and `/openapi.json` as this service really answers."""
    app.mount(_FILES, StaticFiles(directory=_VENDOR), name="docs files")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"{_FILES}/swagger-ui-bundle.js",
            swagger_css_url=f"{_FILES}/swagger-ui.css",
            swagger_favicon_url=f"{_FILES}/favicon-32x32.png",
            swagger_ui_parameters={"persistAuthorization": True, "tryItOutEnabled": True},
        )

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this way to extend its schema


def _schema(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in schema["paths"].values():
        for operation in path.values():
            # FastAPI promises 422 with a body of its own; validation answers 400 with a problem document here.
            operation["responses"].pop("422", None)
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components.update(problem.pop("$defs", {}))
    components["Problem"] = problem
    return schema
