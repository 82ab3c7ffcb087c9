"""Rows that are JSON and no conversation: every field with every type that it must not have, roles and turns."""

from __future__ import annotations

import json
from typing import Any

from tests.hostile.checking import Bad

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
CALL = {"type": "function", "function": {"name": "sail", "arguments": "{}"}}

# As JSON would have them, with the word that the message has for each.
WRONG = {
    "null": None, "a boolean": True, "an integer": 7, "a fraction": -0.5, "a string": "x", "an array": ["x"],
    "an empty array": [], "an object": {"x": 1}, "an empty object": {}, "a huge number": 10**400, "an empty string": "",
    "blanks": " \n\t\u3000", "a string of null": "null",
}  # fmt: skip


def rows(name: str, says: str, *columns: Any) -> Bad:
    """Return a JSON Lines file of `columns`."""
    return Bad(name, "a.jsonl", "".join(json.dumps(item) + "\n" for item in columns), says)


def chat(name: str, says: str, *messages: Any, **more: Any) -> Bad:
    """Return a file whose second row is the conversation."""
    return rows(name, f"row 2: {says}", {"messages": [USER, ANSWER]}, {"messages": list(messages)} | more)


def _types(field: str, row: Any, taken: tuple[str, ...], says: str) -> list[Bad]:
    # `row` makes a row of a value; `taken` are those that the field may have.
    return [rows(f"{field} is {word}", says, row(value)) for word, value in WRONG.items() if word not in taken]


TYPES = [
    *_types("messages", lambda v: {"messages": v}, (), "row 1: messages"),
    *_types("a message", lambda v: {"messages": [USER, v]}, (), "row 1: messages[1]"),
    *_types("role", lambda v: {"messages": [{"role": v, "content": "a"}]}, (), "row 1: messages[0] role"),
    *_types("content", lambda v: {"messages": [USER, ANSWER | {"content": v}]}, ("a string", "a string of null"),
            "row 1: messages[1].content"),
    *_types("weight", lambda v: {"messages": [USER, ANSWER | {"weight": v}]}, ("null", "a boolean"),
            "row 1: messages[1].weight"),
    *_types("tool_calls", lambda v: {"messages": [USER, ANSWER | {"tool_calls": v}]}, ("null", "an empty array"),
            "row 1: messages[1].tool_calls"),
    *_types("name", lambda v: {"messages": [USER | {"name": v}, ANSWER]},
            ("null", "a string", "a string of null", "an empty string", "blanks"), "row 1: messages[0].name"),
    *_types("reasoning_content", lambda v: {"messages": [USER, ANSWER | {"reasoning_content": v}]},
            ("null", "a string", "a string of null", "an empty string", "blanks"),
            "row 1: messages[1].reasoning_content"),
    *_types("tools", lambda v: {"messages": [USER, ANSWER], "tools": v},
            ("null", "an empty array", "an empty string"), "row 1: tools"),
    *_types("prompt", lambda v: {"prompt": v, "completion": "a"},
            ("a string", "a string of null", "an empty string", "blanks"), "row 1: "),
    *_types("completion", lambda v: {"prompt": "a", "completion": v}, ("a string", "a string of null"), "row 1: "),
    *_types("text", lambda v: {"text": v}, ("a string", "a string of null"), "row 1: text"),
    *_types("instruction", lambda v: {"instruction": v, "output": "a"}, ("a string", "a string of null"),
            "row 1: instruction"),
    *_types("input", lambda v: {"instruction": "a", "input": v, "output": "a"},
            ("null", "a string", "a string of null", "an empty string", "blanks"), "row 1: input"),
    *_types("conversations", lambda v: {"conversations": v}, (), "row 1: conversations"),
    *_types("from", lambda v: {"conversations": [{"from": v, "value": "a"}]}, (), "row 1: conversations[0] role"),
]  # fmt: skip

ROLES = [
    chat("an unknown role", "messages[0] role 'wizard' is not known", {"role": "wizard", "content": "a"}),
    chat("a role of a megabyte", "messages[0] role 'rrr", {"role": "r" * 1_000_000, "content": "a"}),
    chat("a role that is a template", "messages[0] role '{{", {"role": "{{ 7*7 }}", "content": "a"}),
    chat("a role with a blank", "messages[0] role 'user '", {"role": "user ", "content": "a"}),
    chat("a role in capitals", "messages[0] role 'User'", {"role": "User", "content": "a"}),
    chat("a role in look-alikes", "messages[0] role 'us\u0435r'", {"role": "us\u0435r", "content": "a"}),
    chat("a role with control characters", "messages[0] role 'user\\x1b[2J'", {"role": "user\x1b[2J", "content": "a"}),
    chat("a role with a bidi override", "messages[0] role 'user\\u202e'", {"role": "user\u202e", "content": "a"}),
    chat("no role", "messages[0] has no role", {"content": "a"}),
    chat("no content", "messages[0] has no content", {"role": "user"}, ANSWER),
    chat("no answer", "messages has no assistant turn", USER),
    chat("no answer that counts", "messages holds nothing to learn", USER, ANSWER | {"weight": 0}),
    chat("an empty answer", "messages[1].content is empty", USER, ANSWER | {"content": ""}),
    chat("an answer of blanks", "messages[1].content is empty", USER, ANSWER | {"content": " \n\u00a0"}),
    chat("an empty question", "messages[0].content is empty", USER | {"content": ""}, ANSWER),
    chat("nothing said", "messages is an empty array"),
    chat("an image", "messages[0].content[0] is of type 'image_url'",
         {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}),
    chat("a part without text", "messages[0].content[0].text is null", {"role": "user", "content": [{"type": "text"}]}),
    chat("a NUL in the content", "messages[0].content holds a NUL", USER | {"content": "a\0b"}, ANSWER),
    chat("a surrogate in the content", "messages[1].content holds a lone", USER, ANSWER | {"content": "\udfff"}),
    chat("a surrogate in a part", "messages[0].content[0].text holds a lone",
         {"role": "user", "content": [{"type": "text", "text": "\ud800"}]}, ANSWER),
    chat("a surrogate in a name", "messages[0].name holds a lone", USER | {"name": "\ud800"}, ANSWER),
    chat("a NUL in a name", "messages[0].name holds a NUL", USER | {"name": "\0"}, ANSWER),
    chat("a surrogate in the reasoning", "messages[1].reasoning_content holds a lone", USER,
         ANSWER | {"reasoning_content": "\udc80"}),
    chat("a surrogate in a call", "messages[1].tool_calls", USER,
         ANSWER | {"tool_calls": [{"function": {"name": "\ud800", "arguments": {}}}]}),
    chat("a surrogate in a call's arguments", "messages[1].tool_calls", USER,
         ANSWER | {"tool_calls": [{"function": {"name": "a", "arguments": {"\ud800": ["\udfff"]}}}]}),
    chat("a surrogate in a call's arguments as text", "messages[1].tool_calls", USER,
         ANSWER | {"tool_calls": [{"function": {"name": "a", "arguments": '{"a": "\\ud800"}'}}]}),
    chat("a surrogate in a tool", "tools", USER, ANSWER, tools=[{"name": "\ud800"}]),
    chat("a tool that is no object", "tools[0] is a string", USER, ANSWER, tools=["sail"]),
    chat("a call without a name", "messages[1].tool_calls[0].function.name is missing", USER,
         ANSWER | {"tool_calls": [{"function": {}}]}),
    chat("arguments that are no JSON", "messages[1].tool_calls[0].function.arguments is not JSON", USER,
         ANSWER | {"tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}),
    chat("a bomb in a call's arguments", "messages[1].tool_calls[0].function.arguments is not JSON", USER,
         ANSWER | {"tool_calls": [{"function": {"name": "a", "arguments": "[" * 100_000}}]}),
    chat("deep arguments as text", "messages[1].tool_calls[0].function.arguments is nested deeper", USER,
         ANSWER | {"tool_calls": [{"function": {"name": "a", "arguments": "[" * 500 + "]" * 500}}]}),
    chat("50,000 turns", "messages", *[USER, ANSWER] * 25_000),
]  # fmt: skip

MIXED = [
    rows("chat, then text", "row 2: has no column 'messages'; it has 'text'",
         {"messages": [USER, ANSWER]}, {"text": "a"}),
    rows("text, then nothing", "row 2: has no column 'text'; it has none", {"text": "a"}, {}),
    rows("a chat after a completion", "row 2: has no column 'prompt' or 'completion'",
         {"prompt": "a", "completion": "b"}, {"messages": [USER, ANSWER]}),
    rows("half a completion", "row 1: has the columns 'prompt'", {"prompt": "a"}),
    rows("a prompt of messages for a text", "row 1: completion is a string, but",
         {"prompt": [USER], "completion": "b"}),
    rows("a completion that asks", "row 1: completion[0] has role 'user'",
         {"prompt": [USER], "completion": [USER, ANSWER]}),
    rows("an unknown speaker", "row 1: conversations[0] role 'wizard'",
         {"conversations": [{"from": "wizard", "value": "a"}]}),
    rows("a speaker without words", "row 1: conversations[0].value is null", {"conversations": [{"from": "human"}]}),
    rows("a conversation without an answer", "row 1: conversations has no assistant turn",
         {"conversations": [{"from": "human", "value": "a"}]}),
    rows("a system prompt of a number", "row 1: system is a number",
         {"system": 7, "conversations": [{"from": "gpt", "value": "a"}]}),
    rows("forty column names of a megabyte", "row 1: has the columns 'aaa",
         {f"{'a' * 100_000}{n}": 1 for n in range(40)}),
    rows("column names that are code", "row 1: has the columns '__class__'", {"__class__": "x", "{{ 7*7 }}": "y"}),
    rows("30 bad rows", "… and 10 more bad rows", *[{"text": ""}] * 30),
    rows("30 bad rows of long roles", "… and 10 more bad rows", *[{"messages": [{"role": "r" * 9_999}]}] * 30),
]  # fmt: skip

ALL = [*TYPES, *ROLES, *MIXED]
