"""Read a server's answers into the shared schemas, also those of a server that is newer than this client.

The schemas are strict where a request is checked, and a job's answer repeats its request: an option that this version
does not know must not keep an old client from showing the job.
"""

from __future__ import annotations

import types
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from common.client.errors import UnexpectedAnswer

M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], data: Any) -> M:
    """Return `data` as a `model`. Unknown fields are left out; known ones with unknown values keep the raw value.

    Raises:
        UnexpectedAnswer: a field that this client cannot do without is absent.
    """
    try:
        return model.model_validate(data)
    except ValidationError:
        return _lenient(model, data)


def _lenient(model: type[M], data: Any) -> M:
    if not isinstance(data, dict):
        raise UnexpectedAnswer(f"the server's answer is not a {model.__name__}", hint=_HINT)
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in data:
            values[name] = _value(field.annotation, data[name])
        elif field.is_required():
            raise UnexpectedAnswer(f"the server's answer lacks {name!r} of a {model.__name__}", hint=_HINT)
    return model.model_construct(**values)


def _value(annotation: Any, value: Any) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        pass
    inner = _variants(annotation)
    if isinstance(value, list):
        items = [get_args(variant)[0] for variant in inner if get_origin(variant) is list]
        return [_value(items[0], item) for item in value] if items else value
    models = [variant for variant in inner if isinstance(variant, type) and issubclass(variant, BaseModel)]
    return _lenient(models[0], value) if models and isinstance(value, dict) else value


def _variants(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the one type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


_HINT = "the client and the server differ in version; update the older one, or check that the URL is Tunery's"
