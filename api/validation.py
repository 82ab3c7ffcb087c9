"""What pydantic found wrong with a request, in words for whoever wrote it.

pydantic reports every branch of a union by itself, under names of its own such as `constrained-float` or
`literal['auto']`. Here a field has one path, as it was typed, and one message.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from api.problems import FieldProblem

Errors = Sequence[Mapping[str, Any]]
Path = tuple[str | int, ...]
_MOST = 20
# A body may hold a hundred thousand unknown keys, and this runs where every other request waits for it.
_LOOKED_AT = 1000
_PHRASES = (
    ("Input should be ", "must be "),
    ("String should match pattern", "must match the pattern"),
    (", unable to parse raw data as a unicode string", " of Unicode, without lone surrogates"),
    (", unable to parse string as an integer", ""),
)
# Errors of a union's branches that were not meant: kept only if no branch took the value's type.
_WRONG_KIND = ("_type", "_parsing", "literal_error", "enum")


def field_problems(errors: Errors, body: Any, model: Any) -> list[FieldProblem]:
    """Return one problem for each field.

    Args:
        errors: pydantic's list, whose paths begin with body, query, path or header.
        body: the parsed body, to tell what was typed from what pydantic added.
        model: the annotation of the body, for suggestions; None if there is no body.
    """
    grouped: dict[Path, list[Mapping[str, Any]]] = {}
    for error in errors[:_LOOKED_AT]:
        where, *path = error["loc"] or ("body",)
        typed = _typed_path(path, body, error["type"]) if where == "body" else tuple(path[:1])
        grouped.setdefault(typed, []).append(error)
    above = {path[:depth] for path in grouped for depth in range(len(path))}
    meant = ((path, found) for path, found in grouped.items() if not (path in above and _is_other_branch(found)))
    return [_problem(path, found, model) for path, found in islice(meant, _MOST)]


def _is_other_branch(found: Errors) -> bool:
    """Return whether a union's branch was not meant, where something is wrong deeper within another one."""
    return all(error["type"].endswith(_WRONG_KIND) for error in found)


def _typed_path(path: Iterable[str | int], body: Any, kind: str) -> Path:
    """Return the part of pydantic's path that names something in the body, or a field that is missing in it."""
    typed: list[str | int] = []
    here = body
    for part in path:
        if _holds(here, part):
            here = here[part]
        elif not (kind == "missing" and isinstance(here, dict)):
            continue
        typed.append(part)
    return tuple(typed)


def _holds(here: Any, part: str | int) -> bool:
    if isinstance(here, dict):
        return part in here
    return isinstance(here, list) and isinstance(part, int) and part < len(here)


def _problem(path: Path, errors: Errors, model: Any) -> FieldProblem:
    param = dotted(path)
    kind = errors[0]["type"]
    if kind == "extra_forbidden":
        return FieldProblem(param=param, message="is not a known key", hint=_suggestion(path, model))
    if kind == "missing":
        return FieldProblem(param=param, message="is required")
    if kind == "json_invalid":
        reason = (errors[0].get("ctx") or {}).get("error", "")
        return FieldProblem(message=f"is not valid JSON: {reason} at character {errors[0]['loc'][-1]}")
    message, named = _message(errors, path)
    return FieldProblem(param=named, message=message)


def _message(errors: Errors, path: Path) -> tuple[str, str | None]:
    """Return what is wrong, and the path of the field that it is about."""
    meant = [error for error in errors if not error["type"].endswith(_WRONG_KIND)]
    words = [error for error in errors if error["type"] == "literal_error"]
    chosen = [*meant, *(error for error in words if error not in meant)] if meant else list(errors)
    texts = list(dict.fromkeys(_words(error) for error in chosen))
    # A check over several fields says itself which one it is about: `max_steps: 0 trains nothing`.
    named, colon, rest = texts[0].partition(": ")
    if (
        colon
        and len(texts) == 1
        and named.replace("_", "").replace(".", "").isalnum()
        and errors[0]["type"] == "value_error"
    ):
        return rest, dotted((*path, named))
    if len(texts) > 1:
        texts[0] = texts[0].replace("' or '", "', '")
    return " or ".join([texts[0], *(text.removeprefix("must be ") for text in texts[1:])]), dotted(path)


def _words(error: Mapping[str, Any]) -> str:
    bounds = error.get("ctx") or {}
    if "min_length" in bounds or "max_length" in bounds:
        unit = "characters" if isinstance(error.get("input"), str) else "items"
        least, most = bounds.get("min_length"), bounds.get("max_length")
        bound = f"at least {least}" if least is not None else f"at most {most}"
        return f"must have {bound} {unit if (least or most) != 1 else unit[:-1]}"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be an object"
    text = str(error["msg"]).removeprefix("Value error, ")
    for theirs, ours in _PHRASES:
        text = text.replace(theirs, ours)
    return text


def dotted(path: Iterable[str | int]) -> str | None:
    """Return a path as `hyperparameters.learning_rate`, or None for the body itself."""
    return ".".join(str(part) for part in path) or None


def _suggestion(path: Path, model: Any) -> str | None:
    """Return what an unknown key was probably meant to be, or where it belongs."""
    key = str(path[-1])
    owner = _model_at(path[:-1], model)
    if owner is None:
        return None
    for name, field in owner.model_fields.items():
        inner = _first_model(field.annotation)
        if inner is not None and key in inner.model_fields:
            return f"It belongs in {dotted((*path[:-1], name))}."
    root = _first_model(model)
    if root is not None and owner is not root and key in root.model_fields:
        return "It belongs at the top level."
    close = difflib.get_close_matches(key, owner.model_fields, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Known keys: {', '.join(owner.model_fields)}."


def _model_at(path: Iterable[str | int], annotation: Any) -> type[BaseModel] | None:
    model = _first_model(annotation)
    for part in path:
        field = model.model_fields.get(str(part)) if model else None
        model = _first_model(field.annotation) if field else None
    return model


def _first_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `Lora`, `Lora | None` or `Annotated[Lora, …]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((model for part in get_args(annotation) if (model := _first_model(part))), None)
    return None
