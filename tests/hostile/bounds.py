"""Values at and beyond every bound of a job's body, read from the schema: a new field is covered by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.schemas.jobs import JobSpec

_SCHEMA: dict[str, Any] = JobSpec.model_json_schema()
_TYPES = {"integer": 1, "number": 1.5, "string": "x", "boolean": True, "array": ["x"], "object": {"x": 1}, "null": None}
# One more value of the types above says what a JSON reader may make of it.
_ODD = ["1", "", "NaN", 10**30, -(10**30), -1, 1e308, [], [[]], {}, {"a": {}}]


@dataclass(frozen=True)
class Field:
    """A field of the body, with the alternatives that its schema allows."""

    path: tuple[str, ...]
    forms: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """Return the name as errors give it."""
        return ".".join(self.path)

    def body(self, value: Any) -> dict[str, Any]:
        """Return the part of a body that sets this field to `value`."""
        for key in reversed(self.path):
            value = {key: value}
        return dict(value)


def fields() -> list[Field]:
    """Return every field of `POST /jobs` that is no object with fields of its own."""
    return list(_fields(_SCHEMA, ()))


def _fields(schema: dict[str, Any], path: tuple[str, ...]) -> Iterator[Field]:
    for name, field in schema["properties"].items():
        forms = [_resolved(form) for form in field.get("anyOf", [field])]
        inner = next((form for form in forms if "properties" in form), None)
        if inner is None:
            yield Field((*path, name), tuple(forms))
        else:
            yield from _fields(inner, (*path, name))


def _resolved(form: dict[str, Any]) -> dict[str, Any]:
    reference = form.get("$ref")
    return form if reference is None else _SCHEMA["$defs"][reference.rpartition("/")[2]]


def at_the_bounds(field: Field) -> list[Any]:
    """Return the least and the greatest number, or every word, that the schema of `field` takes."""
    found: list[Any] = []
    for form in field.forms:
        found += form.get("enum", [form["const"]] if "const" in form else [])
        if form.get("type") in ("integer", "number"):
            found += [edge for edge in _edges(form) if edge is not None]
        if form.get("type") == "boolean":
            found += [True, False]
    return found


def _edges(form: dict[str, Any]) -> list[Any]:
    # The value that a strict bound leaves out has a neighbour that it lets in.
    above, below = form.get("exclusiveMinimum"), form.get("exclusiveMaximum")
    return [
        form.get("minimum", None if above is None else math.nextafter(above, math.inf)),
        form.get("maximum", None if below is None else math.nextafter(below, -math.inf)),
    ]


def beyond(field: Field) -> list[Any]:
    """Return values that `field` must refuse."""
    return [value for value in _candidates(field) if not any(_takes(form, value) for form in field.forms)]


def _candidates(field: Field) -> Iterator[Any]:
    yield from (value for kind, value in _TYPES.items())
    yield from _ODD
    for form in field.forms:
        for key, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
            if key in form:
                yield form[key] + step
                yield math.nextafter(form[key], math.inf if step > 0 else -math.inf) if step else form[key]
        for word in form.get("enum", []):
            yield word.upper() if isinstance(word, str) and word.upper() != word else f"{word} "
        yield from _too_long(form)


def _too_long(form: dict[str, Any]) -> Iterator[Any]:
    if "maxLength" in form:
        yield "x" * (form["maxLength"] + 1)
    if "maxItems" in form:
        yield ["x"] * (form["maxItems"] + 1)
    if "maxProperties" in form:
        yield {f"k{number}": "x" for number in range(form["maxProperties"] + 1)}


def _takes(form: dict[str, Any], value: Any) -> bool:
    """Return whether a form of the schema may take `value`; True where only the server can tell."""
    if "enum" in form or "const" in form:
        return value in form.get("enum", [form.get("const")]) and not isinstance(value, bool)
    kind = form.get("type")
    if kind in ("integer", "number"):
        return _takes_number(form, value)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "null":
        return value is None
    if kind == "string":
        return isinstance(value, str) and form.get("minLength", 0) <= len(value) <= form.get("maxLength", math.inf)
    if kind == "array":
        return isinstance(value, list) and form.get("minItems", 0) <= len(value) <= form.get("maxItems", math.inf)
    return isinstance(value, dict) and len(value) <= form.get("maxProperties", math.inf)


def _takes_number(form: dict[str, Any], value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # JSON's 3.0 is no integer here, but an integer is a number.
    if form["type"] == "integer" and not isinstance(value, int):
        return False
    return form.get("minimum", -math.inf) <= value <= form.get("maximum", math.inf) and form.get(
        "exclusiveMinimum", -math.inf
    ) < value < form.get("exclusiveMaximum", math.inf)


def raw(field: Field, literal: str) -> bytes:
    """Return a body as JSON whose `field` is `literal` as it stands: NaN, Infinity, a number of 5,000 digits."""
    return json.dumps(field.body("@")).replace('"@"', literal).encode()
