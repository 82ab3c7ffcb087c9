"""`--set name=value`: the options of a job as words on a command line."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from common.errors import InvalidInput
from common.schemas.hyperparameters import Hyperparameters
from common.schemas.lora import Lora, Quantization

GROUPS: dict[str, type[BaseModel]] = {"hyperparameters": Hyperparameters, "lora": Lora, "quantization": Quantization}
# Fields of the job itself have options of their own.
_OWN_OPTIONS = {
    **{name: f"--{name}" for name in ("method", "suffix", "seed", "priority", "metadata", "model")},
    "not_before": "--not-before",
    "validation_dataset": "--validation",
    "validation_split": "--validation-split",
    "chat_template": "--chat-template FILE",
    "sample_prompts": "--sample",
    "dataset": "the first argument",
}


def parse_sets(texts: list[str]) -> dict[str, dict[str, Any]]:
    """Return the groups that `--set` options name, with typed values; a later one replaces an earlier one.

    Raises:
        InvalidInput: an option is not `name=value`, names nothing, or its value is not of the option's type.
    """
    groups: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise _wrong(text, "is not of the form name=value", "for example --set learning_rate=1e-4")
        group, option = _find(text, name.strip())
        groups.setdefault(group, {})[option] = _value(text, group, option, value.strip())
    return groups


def parse_labels(texts: list[str], option: str = "--metadata") -> dict[str, str]:
    """Return `key=value` words as a dictionary of texts."""
    labels: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"{option} {text}: is not of the form key=value", param="metadata")
        labels[name] = value
    return labels


def _find(text: str, name: str) -> tuple[str, str]:
    """Return the group and the option that `name` means: group.option, or the option alone."""
    group, dot, option = name.rpartition(".")
    if dot and group not in GROUPS:
        raise _wrong(text, f"there is no group {group!r}", _meant(group, list(GROUPS)))
    for candidate in [group] if dot else list(GROUPS):
        if option in GROUPS[candidate].model_fields:
            return candidate, option
    if option in _OWN_OPTIONS and not dot:
        raise _wrong(text, f"{option!r} is not set this way", f"use {_OWN_OPTIONS[option]}")
    known = [other for candidate in ([group] if dot else GROUPS) for other in GROUPS[candidate].model_fields]
    raise _wrong(text, f"there is no option {name!r}", _meant(option, known))


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(known)}"


def _value(text: str, group: str, option: str, word: str) -> Any:
    value = _typed(word, option)
    field = GROUPS[group].model_fields[option]
    try:
        return _adapter(field).validate_python(value, strict=True)
    except ValidationError as error:
        reasons = " or ".join(dict.fromkeys(_reason(item) for item in error.errors()))
        raise InvalidInput(
            f"--set {text}: {reasons}", code="invalid_option", param=f"{group}.{option}", hint=_default(field)
        ) from error


def _typed(word: str, option: str) -> Any:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        return json.loads(word)
    except ValueError:
        pass
    if option == "modules_to_save":
        return word.split(",")
    if option == "target_modules" and re.fullmatch(r"\w+(,\w+)+", word):
        return word.split(",")
    return float(word) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", word, re.IGNORECASE) else word


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    return TypeAdapter(field.rebuild_annotation())


def _reason(item: Any) -> str:
    message = str(item["msg"])
    return f"{message[0].lower()}{message[1:]}"


def _default(field: FieldInfo) -> str:
    return f"the default is {json.dumps(field.default)}"


def _wrong(text: str, reason: str, hint: str) -> InvalidInput:
    return InvalidInput(f"--set {text}: {reason}", code="invalid_option", param="--set", hint=hint)
