"""The body of `POST /v1/chat/completions` in OpenAI's words: what is obeyed, and what is refused by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from common.errors import InvalidInput
from common.schemas.values import Text

# What is not offered may be sent with the value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
}
_WITHOUT_EFFECT = ("user", "metadata", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        # null means the default. Clients send an answer back as it came, with its `"refusal": null`.
        return {name: value for name, value in values.items() if value is not None} if type(values) is dict else values


def _joined(content: Any) -> Any:
    """Return the text of a content that comes in parts."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError("only parts of the type text are known")
    texts = [part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a part has no text")
    return "".join(texts)


class Turn(_Strict):
    """One message. A `name` is allowed and not shown to the model, as few templates know it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text, BeforeValidator(_joined)]
    name: Text | None = None


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False


def _listed(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class ChatRequest(_Strict):
    """What is asked. `max_tokens` None: as many as fit, up to the operator's bound."""

    model: Annotated[Text, Field(min_length=1, max_length=1000)]
    messages: Annotated[list[Turn], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=200)]], Field(max_length=4), BeforeValidator(_listed)
    ] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def parse(body: bytes) -> ChatRequest:
    """Return the request in a body.

    Raises:
        InvalidInput: it is none, or asks for what is not offered; the message names the field.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise InvalidInput("the body is not a JSON object", code="invalid_json")
    try:
        return ChatRequest.model_validate(_offered(values))
    except ValidationError as error:
        raise _named(error) from error


def _offered(values: dict[str, Any]) -> dict[str, Any]:
    """Return what is left of a body without what has no effect; raises InvalidInput for what is not offered."""
    for name, neutral in _NEUTRAL.items():
        if name in values and values[name] not in neutral:
            raise InvalidInput(f"{name}: this server offers no other value than {neutral[-1]!r}", param=name)
    rest = {name: value for name, value in values.items() if name not in _NEUTRAL and name not in _WITHOUT_EFFECT}
    newer = rest.pop("max_completion_tokens", None)
    if newer is not None:
        rest["max_tokens"] = newer
    return rest


def _named(error: ValidationError) -> InvalidInput:
    first = error.errors()[0]
    # Names of types stand in the path of a union.
    path = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[")))
    if first["type"] == "extra_forbidden":
        return InvalidInput(f"{path}: this server does not know this field", code="unknown_parameter", param=path)
    return InvalidInput(f"{path}: {first['msg'].removeprefix('Value error, ')}", param=path or None)
