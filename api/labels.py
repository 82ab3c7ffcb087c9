"""Jobs are listed by the labels that they carry: `metadata[key]=value` in the query."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Depends, Request

from common.errors import InvalidInput
from common.jobs.selection import check_label

_LABEL = re.compile(r"metadata\[(.*)\]", re.DOTALL)
LABELS_DOC: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "`metadata[key]=value`: jobs with this label.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


def labels(request: Request) -> dict[str, str]:
    """Return what `metadata[key]=value` in the query asks for."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        match = _LABEL.fullmatch(name)
        if match is None and name.partition("[")[0] == "metadata":
            raise InvalidInput(f"{name}: write metadata[key]=value", param="metadata")
        if match is not None:
            check_label(match[1], value)
            found[match[1]] = value
    if len(found) > 16:
        raise InvalidInput("metadata: at most 16 labels", param="metadata")
    return found


def labels_or_none(request: Request) -> dict[str, str] | None:
    """Return what `labels` does, or None for `metadata=null`, which asks for jobs that carry no label."""
    named = [name for name in request.query_params if name.partition("[")[0] == "metadata"]
    if named == ["metadata"] and request.query_params["metadata"] == "null":
        return None
    return labels(request)


Labels = Annotated[dict[str, str], Depends(labels)]
LabelsOrNone = Annotated[dict[str, str] | None, Depends(labels_or_none)]
