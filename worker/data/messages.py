"""Checks one conversation and gives every message its canonical form."""

from __future__ import annotations

from typing import Any

from worker.data import strict_json
from worker.data.rows import ROLES, Message

_EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_ROLE_HINTS = {
    "function": 'use "tool"',
    "bot": 'use "assistant"',
    "model": 'use "assistant"',
    "gpt": 'use "assistant", or name the column "conversations"',
    "human": 'use "user", or name the column "conversations"',
}


class BadColumn(ValueError):
    """What is wrong with a column of a row; `hint` says what to do."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


def check_text(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    """Return `value` if it is a string that can be stored and trained on.

    Raises:
        BadColumn: wrong type, empty, or holding a NUL or lone surrogate; the message begins with `where`.
    """
    if not isinstance(value, str):
        raise BadColumn(f"{where} is {name_type(value)}, not a string", "write it as a string")
    if "\x00" in value:
        raise BadColumn(f"{where} holds a NUL character", "remove it")
    if found := strict_json.SURROGATE.search(value):
        raise BadColumn(
            f"{where} holds a lone surrogate (U+{ord(found.group()):04X}) at character {found.start() + 1}",
            "the text was cut inside a character; write it again from the source",
        )
    if not may_be_empty and not value.strip():
        raise BadColumn(f"{where} is empty", "fill it in, or remove the row")
    return value


def name_type(value: Any) -> str:
    """Return the JSON name of the type of `value`, with an article."""
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a string", dict: "an object", list: "an array", int: "a number", float: "a number", bytes: "binary"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def unpack(value: Any, where: str) -> list[Any]:
    """Return the list in `value`; a string is read as JSON, because CSV has no lists."""
    if isinstance(value, str):
        try:
            value = strict_json.loads(value)
        except strict_json.BadJson as error:
            raise BadColumn(f"{where} is a string that is not JSON ({error})", "write a JSON array") from error
    if not isinstance(value, list):
        raise BadColumn(f"{where} is {name_type(value)}, not an array", 'write [{"role": …, "content": …}, …]')
    if not value:
        raise BadColumn(f"{where} is an empty array", "add at least one message, or remove the row")
    return value


def read_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Return the conversation in `value`, a list of {role, content} objects."""
    return tuple(_read_message(item, f"{where}[{index}]") for index, item in enumerate(unpack(value, where)))


def _read_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadColumn(f"{where} is {name_type(item)}, not an object", 'write {"role": …, "content": …}')
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        found = f"role {role!r} is not known" if "role" in item else "has no role"
        raise BadColumn(f"{where} {found}", _ROLE_HINTS.get(str(role), f"roles are {', '.join(ROLES)}"))
    # Parquet fills the fields that a message does not have with null.
    extra = {key: item[key] for key in _EXTRA if item.get(key) is not None}
    if "tool_calls" in extra:
        extra["tool_calls"] = _read_calls(extra["tool_calls"], f"{where}.tool_calls")
    content = _read_content(item, where, silent="tool_calls" in extra or role == "tool")
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise BadColumn(f"{where}.weight is {weight!r}", "weight is 0 or 1")
    return Message(role, content, tuple(extra.items()), trained=weight != 0)


def _read_content(item: dict[str, Any], where: str, *, silent: bool) -> str:
    content = item.get("content")
    if content is None and silent:
        return ""
    if "content" not in item:
        raise BadColumn(f"{where} has no content", 'write {"role": …, "content": …}')
    if isinstance(content, list):
        content = "".join(_read_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    return check_text(content, f"{where}.content", may_be_empty=silent)


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise BadColumn(f"{where} is of type {kind!r}", "only parts of type text can be trained on")
    return check_text(part.get("text"), f"{where}.text", may_be_empty=True)


def _read_calls(calls: Any, where: str) -> list[Any]:
    # OpenAI writes the arguments as a string of JSON, chat templates want the object.
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadColumn(f"{where} is not an array of objects", "write OpenAI's form of tool calls")
    return [_read_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _read_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadColumn(f"{where}.function.name is missing", "write OpenAI's form of tool calls")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments)
        except strict_json.BadJson as error:
            raise BadColumn(
                f"{where}.function.arguments is not JSON ({error})", "write the arguments as JSON"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}


def read_sharegpt(value: Any, where: str) -> tuple[Message, ...]:
    """Return the conversation in `value`, a list of {from, value} objects."""
    return tuple(_read_turn(item, f"{where}[{index}]") for index, item in enumerate(unpack(value, where)))


def _read_turn(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadColumn(f"{where} is {name_type(item)}, not an object", 'write {"from": …, "value": …}')
    if "from" not in item and "role" in item:
        return _read_message(item, where)
    speaker = item.get("from")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        found = f"role {speaker!r} is not known" if "from" in item else "has no from"
        raise BadColumn(f"{where} {found}", f"from is one of {', '.join(_SHAREGPT_ROLES)}")
    return Message(role, check_text(item.get("value"), f"{where}.value"))


def check_conversation(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """Return `messages` if there is something in them to learn: an assistant's turn that is trained on."""
    if not any(message.role == "assistant" for message in messages):
        raise BadColumn(
            f"{where} has no assistant turn, so there is nothing to learn", "add the answer, or remove the row"
        )
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise BadColumn(f"{where}: every assistant turn has weight 0", "give one the weight 1, or remove the row")
    return messages
