"""Checks one conversation and gives every message its canonical form."""

from __future__ import annotations

from typing import Any

from worker.data import strict_json
from worker.data.limits import Limits
from worker.data.rows import ROLES, Message

# Turns of one conversation. Each answer is labelled by rendering all that comes before it, so the work grows as the
# square of their number.
TURNS_MAX = 1024

_EXTRA_TEXTS = ("tool_call_id", "name", "reasoning_content")
_DEPTH_MAX = Limits.max_depth
_CALLS_HINT = "write OpenAI's form of tool calls"
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
    """What is wrong in the place `where` of a row, as a word and a sentence; `hint` says what to do."""

    def __init__(self, where: str, code: str, what: str, hint: str):
        self.message = f"{where} {what}"
        super().__init__(self.message)
        self.where = where
        self.code = code
        self.hint = hint


def check_text(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    """Return `value` if it is a string that can be stored and trained on.

    Raises:
        BadColumn: wrong type, empty, or holding a NUL or lone surrogate; the message begins with `where`.
    """
    if not isinstance(value, str):
        raise BadColumn(where, "wrong_type", f"is {name_type(value)}, not a string", "write it as a string")
    if "\x00" in value:
        raise BadColumn(where, "nul", "holds a NUL character", "remove it")
    if found := strict_json.SURROGATE.search(value):
        raise BadColumn(
            where,
            "surrogate",
            f"holds a lone surrogate (U+{ord(found.group()):04X}) at character {found.start() + 1}",
            "the text was cut inside a character; write it again from the source",
        )
    if not may_be_empty and not value.strip():
        raise BadColumn(where, "empty", "is empty", "fill it in, or remove the row")
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
        value = _loads(value, where, "a string that is not JSON", "write a JSON array")
    if not isinstance(value, list):
        raise BadColumn(
            where, "wrong_type", f"is {name_type(value)}, not an array", 'write [{"role": …, "content": …}, …]'
        )
    if not value:
        raise BadColumn(where, "empty", "is an empty array", "add at least one message, or remove the row")
    return value


def _loads(text: str, where: str, otherwise: str, hint: str) -> Any:
    # JSON inside a string has been seen by no check before.
    try:
        value = strict_json.loads(text)
    except strict_json.BadJson as error:
        raise BadColumn(where, "bad_json", f"is {otherwise} ({error})", hint) from error
    if strict_json.depth(value, _DEPTH_MAX) > _DEPTH_MAX:
        raise BadColumn(where, "too_deep", f"is nested deeper than {_DEPTH_MAX} levels", "write it flatter")
    return value


def check_texts(value: Any, where: str) -> Any:
    """Return `value`, any JSON, if all strings in it can be stored and trained on; raises as `check_text` does."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            check_text(item, where, may_be_empty=True)
        elif isinstance(item, dict):
            stack.extend((*item, *item.values()))
        elif isinstance(item, list):
            stack.extend(item)
    return value


def read_tools(value: Any, where: str) -> tuple[Any, ...]:
    """Return the descriptions of tools in `value`: none, a list of objects, or such a list as JSON in a string."""
    if value is None or value == "" or value == []:
        return ()
    tools = unpack(value, where)
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadColumn(
                f"{where}[{index}]",
                "wrong_type",
                f"is {name_type(tool)}, not an object",
                "write each tool as a JSON schema",
            )
        check_texts(tool, f"{where}[{index}]")
    return tuple(tools)


def read_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Return the conversation in `value`, a list of {role, content} objects."""
    return tuple(_read_message(item, f"{where}[{index}]") for index, item in enumerate(_turns(value, where)))


def _turns(value: Any, where: str) -> list[Any]:
    turns = unpack(value, where)
    if len(turns) > TURNS_MAX:
        raise BadColumn(
            where, "too_many_turns", f"has {len(turns):,} turns, more than {TURNS_MAX:,}", "split it into several rows"
        )
    return turns


def _read_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadColumn(where, "wrong_type", f"is {name_type(item)}, not an object", 'write {"role": …, "content": …}')
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        found = f"role {role!r} is not known" if "role" in item else "has no role"
        raise BadColumn(where, "bad_role", found, _ROLE_HINTS.get(str(role), f"roles are {', '.join(ROLES)}"))
    # Parquet fills the fields that a message does not have with null.
    extra: dict[str, Any] = {
        key: check_text(item[key], f"{where}.{key}", may_be_empty=True)
        for key in _EXTRA_TEXTS
        if item.get(key) is not None
    }
    if item.get("tool_calls") is not None:
        extra = {"tool_calls": _read_calls(item["tool_calls"], f"{where}.tool_calls")} | extra
    content = _read_content(item, where, silent="tool_calls" in extra or role == "tool")
    return Message(role, content, tuple(extra.items()), trained=_read_weight(item, where))


def _read_weight(item: dict[str, Any], where: str) -> bool:
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise BadColumn(f"{where}.weight", "bad_weight", f"is {weight!r}", "weight is 0 or 1")
    return weight != 0


def _read_content(item: dict[str, Any], where: str, *, silent: bool) -> str:
    content = item.get("content")
    if content is None and silent:
        return ""
    if "content" not in item:
        raise BadColumn(where, "missing", "has no content", 'write {"role": …, "content": …}')
    if isinstance(content, list):
        content = "".join(_read_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    return check_text(content, f"{where}.content", may_be_empty=silent)


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise BadColumn(where, "not_text", f"is of type {kind!r}", "only parts of type text can be trained on")
    return check_text(part.get("text"), f"{where}.text", may_be_empty=True)


def _read_calls(calls: Any, where: str) -> list[Any]:
    # OpenAI writes the arguments as a string of JSON, chat templates want the object.
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadColumn(where, "wrong_type", "is not an array of objects", _CALLS_HINT)
    return [_read_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _read_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadColumn(f"{where}.function.name", "missing", "is missing", _CALLS_HINT)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, f"{where}.function.arguments", "not JSON", "write the arguments as JSON")
    made: dict[str, Any] = check_texts({**call, "function": {**function, "arguments": arguments}}, where)
    return made


def read_sharegpt(value: Any, where: str) -> tuple[Message, ...]:
    """Return the conversation in `value`, a list of {from, value} objects."""
    return tuple(_read_turn(item, f"{where}[{index}]") for index, item in enumerate(_turns(value, where)))


def _read_turn(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise BadColumn(where, "wrong_type", f"is {name_type(item)}, not an object", 'write {"from": …, "value": …}')
    if "from" not in item and "role" in item:
        return _read_message(item, where)
    speaker = item.get("from")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        found = f"role {speaker!r} is not known" if "from" in item else "has no from"
        raise BadColumn(where, "bad_role", found, f"from is one of {', '.join(_SHAREGPT_ROLES)}")
    return Message(role, check_text(item.get("value"), f"{where}.value"), trained=_read_weight(item, where))


def check_conversation(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """Return `messages` if there is something in them to learn: an assistant's turn that is trained on."""
    if not any(message.role == "assistant" for message in messages):
        raise BadColumn(
            where,
            "nothing_to_learn",
            "has no assistant turn, so there is nothing to learn",
            "add the answer, or remove the row",
        )
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise BadColumn(
            where,
            "nothing_to_learn",
            "holds nothing to learn: every assistant turn has weight 0",
            "give one the weight 1, or remove the row",
        )
    return messages
