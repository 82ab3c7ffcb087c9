"""Columns are recognised, rows take one form, and what is wrong is named by row, column and role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import BadRows, InvalidInput
from worker.data.formats import parse_rows
from worker.data.rows import Message, Row
from worker.data.source import Problems, Source

USER = {"role": "user", "content": "Where is the boat?"}
ANSWER = {"role": "assistant", "content": "On the sea."}
PARTS = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the boat?"}]
CHAT = (Message("user", "Where is the boat?"), Message("assistant", "On the sea."))


def parse(folder: Path, *rows: Any, problems: Problems | None = None) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(parse_rows(Source(path), problems))


def refusal(folder: Path, *rows: Any) -> BadRows:
    with pytest.raises(BadRows) as caught:
        parse(folder, *rows)
    assert caught.value.message.startswith("dataset: row ") and caught.value.code == "bad_row"
    return caught.value


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [USER, ANSWER]}, Row(1, "chat", messages=CHAT)),
        ({"messages": json.dumps([USER, ANSWER])}, Row(1, "chat", messages=CHAT)),
        ({"messages": [USER, ANSWER], "text": "x", "id": 7}, Row(1, "chat", messages=CHAT)),
        (
            {"messages": [USER, ANSWER | {"weight": 0}, ANSWER | {"weight": 1}]},
            Row(1, "chat", messages=(CHAT[0], Message("assistant", "On the sea.", trained=False), CHAT[1])),
        ),
        (
            {"messages": [{"role": "user", "content": PARTS}, ANSWER]},
            Row(1, "chat", messages=CHAT),
        ),
        ({"messages": [USER, ANSWER], "tools": [{"name": "t"}]}, Row(1, "chat", messages=CHAT, tools=({"name": "t"},))),
        ({"prompt": "a", "completion": "b"}, Row(1, "completion", prompt="a", completion="b")),
        ({"prompt": "", "completion": "b"}, Row(1, "completion", prompt="", completion="b")),
        ({"prompt": [USER], "completion": [ANSWER]}, Row(1, "completion", messages=CHAT, num_prompt=1)),
        ({"text": "a"}, Row(1, "text", text="a")),
        ({"instruction": "Where is the boat?", "output": "On the sea."}, Row(1, "chat", messages=CHAT)),
        ({"instruction": "Where is the boat?", "input": None, "output": "On the sea."}, Row(1, "chat", messages=CHAT)),
        (
            {"instruction": "Where?", "input": "the boat", "output": "On the sea."},
            Row(1, "chat", messages=(Message("user", "Where?\n\nthe boat"), CHAT[1])),
        ),
        (
            {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "On the sea."}]},
            Row(1, "chat", messages=CHAT),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0},
                               {"from": "gpt", "value": "b", "weight": 1}]},
            Row(1, "chat", messages=(
                Message("user", "a"), Message("assistant", "b", trained=False), Message("assistant", "b"))),
        ),
        (
            {"system": "Be brief", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Row(1, "chat", messages=(Message("system", "Be brief"), Message("user", "a"), Message("assistant", "b"))),
        ),
    ],
)  # fmt: skip
def test_every_format_takes_one_form(tmp_path: Path, columns: dict[str, Any], expected: Row):
    assert parse(tmp_path, columns) == [expected]


def test_tool_calls_keep_their_arguments_as_an_object(tmp_path: Path):
    call = {"type": "function", "function": {"name": "sail", "arguments": '{"to": "sea"}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    tool = {"role": "tool", "content": "done", "tool_call_id": "1"}
    row = parse(tmp_path, {"messages": [USER, answer, tool, ANSWER]})[0]
    assert row.messages[1].as_dict()["tool_calls"][0]["function"]["arguments"] == {"to": "sea"}
    assert row.messages[2].as_dict() == tool


def test_parquet_rows_are_read_alike(tmp_path: Path):
    rows = [{"messages": [USER, ANSWER | {"name": "bo"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert next(parse_rows(Source(tmp_path / "a.parquet"))).messages[0] == CHAT[0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"foo": 1, "bar": 2},
            "row 1: has the columns 'foo', 'bar' | accepted columns are: messages; prompt and completion",
        ),
        (
            {"prompt;completion": "a;b"},
            "columns 'prompt;completion' | put commas between the columns, not semicolons; accepted",
        ),
        ({"prompt\tcompletion": "a"}, "| give a file with tabs the ending .tsv; accepted"),
        ({}, "row 1: has the columns none"),
        ({"prompt": "a"}, "row 1: has the columns 'prompt'"),
        ({"messages": []}, "messages is an empty array"),
        ({"messages": "hello"}, "messages is a string that is not JSON"),
        ({"messages": {"role": "user"}}, "messages is an object, not an array"),
        ({"messages": None}, "messages is null, not an array"),
        ({"messages": ["hi"]}, "messages[0] is a string, not an object"),
        (
            {"messages": [{"role": "wizard", "content": "a"}]},
            "messages[0] role 'wizard' is not known | roles are system",
        ),
        ({"messages": [{"role": "function", "content": "a"}]}, "role 'function' is not known | use \"tool\""),
        ({"messages": [{"role": None, "content": "a"}]}, "role None is not known"),
        ({"messages": [{"content": "a"}]}, "messages[0] has no role"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1] has no content"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1].content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content is null, not a string"),
        ({"messages": [USER, {"role": "assistant", "content": 7}]}, "messages[1].content is a number, not a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is of type 'image_url'",
        ),
        ({"messages": [USER, ANSWER | {"weight": 2}]}, "messages[1].weight is 2"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "every assistant turn has weight 0"),
        ({"messages": [USER]}, "messages has no assistant turn"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"function": {}}]}]}, "tool_calls[0].function.name is missing"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": 1, "completion": "b"}, "prompt is a number, not a string"),
        ({"prompt": [USER], "completion": "b"}, "completion is a string, but the other"),
        ({"prompt": [USER], "completion": [USER]}, "completion has no assistant turn"),
        ({"prompt": [USER], "completion": [USER, ANSWER]}, "completion[0] has role 'user'"),
        ({"text": ""}, "text is empty"),
        ({"text": ["a"]}, "text is an array, not a string"),
        ({"text": True}, "text is a boolean, not a string"),
        ({"text": "a\x00b"}, "text holds a NUL character"),
        ({"text": "ab\ud800"}, "text holds a lone surrogate (U+D800) at character 3"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content holds a lone surrogate"),
        ({"instruction": "", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "output": None}, "output is null"),
        (
            {"conversations": [{"from": "wizard", "value": "a"}]},
            "conversations[0] role 'wizard' is not known | from is one of human",
        ),
        ({"conversations": [{"value": "a"}]}, "conversations[0] has no from"),
        ({"conversations": [{"from": "human", "value": ""}]}, "conversations[0].value is empty"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations has no assistant turn"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, columns: dict[str, Any], words: str):
    error = refusal(tmp_path, columns)
    assert words in f"{error.message} | {error.hint}"
    assert error.param == "dataset"


@pytest.mark.parametrize(
    "columns",
    [
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b", "label": False},
    ],
)
def test_preferences_are_refused_as_such(tmp_path: Path, columns: dict[str, Any]):
    refused = refusal(tmp_path, columns)
    assert "holds preferences" in refused.message and "messages" in str(refused.hint)


def test_conversations_are_learned_from_whatever_stands_beside_them(tmp_path: Path):
    beside = {"messages": [USER, ANSWER], "chosen": [ANSWER], "rejected": [USER], "label": True}
    assert [row.messages for row in parse(tmp_path, beside)] == [CHAT]
    assert parse(tmp_path, {"prompt": "a", "completion": "b", "label": "sea"})[0].completion == "b"


def test_formats_may_not_be_mixed(tmp_path: Path):
    error = refusal(tmp_path, {"messages": [USER, ANSWER]}, {"text": "a"})
    assert "row 2: has no column 'messages'; it has 'text'" in error.message and "chat" in error.message


def test_all_bad_rows_are_reported_together(tmp_path: Path):
    problems = Problems()
    rows = [{"text": "good"}, *({"text": ""} for _ in range(30)), {"text": "good too"}]
    assert [row.number for row in parse(tmp_path, *rows, problems=problems)] == [1, 32]
    with pytest.raises(InvalidInput) as caught:
        problems.raise_any()
    lines = caught.value.message.splitlines()
    assert lines[0] == "dataset: row 2: text is empty" and lines[-1] == "… and 10 more bad rows"
    assert len(lines) == 21 and caught.value.code == "bad_rows"
    assert isinstance(caught.value, BadRows) and caught.value.num_problems == 30
    assert [(each.row, each.field, each.code) for each in caught.value.problems] == [
        (number, "text", "empty") for number in range(2, 32)
    ]


@pytest.mark.parametrize(
    ("row", "field", "code"),
    [
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, "messages[1]", "bad_role"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content", "wrong_type"),
        ({"messages": [USER, ANSWER | {"weight": 3}]}, "messages[1].weight", "bad_weight"),
        ({"messages": [USER]}, "messages", "nothing_to_learn"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "cat", "value": "b"}]},
            "conversations[1]",
            "bad_role",
        ),
        ({"prompt": [USER], "completion": "b"}, "completion", "wrong_type"),
        ({"text": "a\x00"}, "text", "nul"),
        ({"foo": "a"}, None, "unknown_columns"),
    ],
)
def test_what_is_wrong_is_told_to_programs_too(tmp_path: Path, row: Any, field: str | None, code: str):
    problem = refusal(tmp_path, row).problems[0]
    assert (problem.param, problem.row, problem.field, problem.code) == ("dataset", 1, field, code)


def test_one_bad_row_is_reported_as_itself(tmp_path: Path):
    problems = Problems()
    parse(tmp_path, {"text": "good"}, {"text": ""}, problems=problems)
    with pytest.raises(InvalidInput, match="row 2: text is empty") as caught:
        problems.raise_any()
    assert caught.value.code == "bad_row"
    Problems().raise_any()
