"""Names in a request's path and query: unknown parameters are refused by name, as unknown keys of a body are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fastapi import Request
from fastapi.routing import APIRoute

from common.errors import InvalidInput, NotFound


def known_parameters(route: APIRoute) -> list[str]:
    """Return the names that may stand in the query of `route`."""
    documented = (route.openapi_extra or {}).get("parameters", [])
    return [field.alias for field in route.dependant.query_params] + [item["name"] for item in documented]


def check_names(request: Request, known: Sequence[str]) -> None:
    """Raise unless the path can name something and the query names known parameters only.

    Raises:
        NotFound: the path holds a NUL, which no database stores.
        InvalidInput: a parameter is unknown.
    """
    if any("\x00" in str(value) for value in request.path_params.values()):
        raise NotFound("there is no such thing", param="id")
    for name in request.query_params:
        if name.partition("[")[0] not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known) or 'none'}."
            raise InvalidInput(f"{name[:100]}: is not a known query parameter", param=name[:100], hint=hint)
