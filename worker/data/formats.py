"""Recognises the columns of a dataset and turns each row into the one form that is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common.errors import BadRows
from worker.data.messages import (
    BadColumn,
    check_conversation,
    check_text,
    name_type,
    read_messages,
    read_sharegpt,
    read_tools,
)
from worker.data.read import read_rows
from worker.data.rows import Message, Row
from worker.data.source import Problems, Source

Columns = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A layout of columns: those that it needs, and how a row of them is read."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[int, Columns], Row]


def _chat(number: int, columns: Columns) -> Row:
    messages = check_conversation(read_messages(columns["messages"], "messages"), "messages")
    return Row(number, "chat", messages=messages, tools=_tools(columns))


def _tools(columns: Columns) -> tuple[Any, ...]:
    return read_tools(columns.get("tools"), "tools")


def _sharegpt(number: int, columns: Columns) -> Row:
    messages = read_sharegpt(columns["conversations"], "conversations")
    system = columns.get("system")
    if system is not None and system != "":
        messages = (Message("system", check_text(system, "system")), *messages)
    return Row(number, "chat", messages=check_conversation(messages, "conversations"), tools=_tools(columns))


def _completion(number: int, columns: Columns) -> Row:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return _chat_completion(number, columns)
    # An empty prompt is a completion from nothing: allowed.
    prompt = check_text(prompt, "prompt", may_be_empty=True)
    return Row(number, "completion", prompt=prompt, completion=check_text(completion, "completion"))


def _chat_completion(number: int, columns: Columns) -> Row:
    for name in ("prompt", "completion"):
        if not isinstance(columns[name], list):
            raise BadColumn(
                name,
                "wrong_type",
                f"is {name_type(columns[name])}, but the other of prompt and completion is an array of messages",
                "write both as strings, or both as arrays of messages",
            )
    prompt = read_messages(columns["prompt"], "prompt")
    completion = check_conversation(read_messages(columns["completion"], "completion"), "completion")
    if completion[0].role != "assistant":
        raise BadColumn(
            "completion[0]", "bad_order", f"has role {completion[0].role!r}", "a completion begins with the assistant"
        )
    return Row(number, "completion", messages=prompt + completion, num_prompt=len(prompt), tools=_tools(columns))


def _alpaca(number: int, columns: Columns) -> Row:
    instruction = check_text(columns["instruction"], "instruction")
    context = columns.get("input")
    context = "" if context is None else check_text(context, "input", may_be_empty=True)
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    messages = (Message("user", question), Message("assistant", check_text(columns["output"], "output")))
    return Row(number, "chat", messages=messages)


def _text(number: int, columns: Columns) -> Row:
    return Row(number, "text", text=check_text(columns["text"], "text"))


# In order of preference: a row with both `messages` and `text` is a chat.
FORMATS = (
    Format("chat", ("messages",), _chat),
    Format("sharegpt", ("conversations",), _sharegpt),
    Format("prompt/completion", ("prompt", "completion"), _completion),
    Format("alpaca", ("instruction", "output"), _alpaca),
    Format("text", ("text",), _text),
)
ACCEPTED = "messages; prompt and completion; text; instruction, input and output (Alpaca); conversations (ShareGPT)"
# In the one column of a CSV file: what parts its columns, and what to do about it. Spreadsheets write semicolons
# where the comma is a decimal sign.
_UNPARTED = {";": "put commas between the columns, not semicolons", "\t": "give a file with tabs the ending .tsv"}


def recognise(columns: Iterable[str]) -> Format | None:
    """Return the format that has all its columns among `columns`, or None."""
    names = set(columns)
    return next((layout for layout in FORMATS if names.issuperset(layout.needs)), None)


def parse_rows(source: Source, problems: Problems | None = None) -> Iterator[Row]:
    """Yield the rows of `source` in canonical form. The first row decides the format of all.

    Args:
        problems: takes what is wrong with single rows, so that all are found; without it the first one raises.

    Raises:
        InvalidInput: the file cannot be read, or (without `problems`) a row is wrong.
    """
    layout = _layout_of(source.whole) if source.share.of > 1 else None
    for number, columns in read_rows(source):
        row: Row | BadRows
        if isinstance(columns, BadRows):
            row = columns
        else:
            layout = layout or _first_layout(source, number, columns)
            row = _parse(source, layout, number, columns)
        if isinstance(row, Row):
            yield row
        elif problems is None:
            raise row
        else:
            problems.add(row)


def _layout_of(source: Source) -> Format | None:
    first = next((item for item in read_rows(source) if isinstance(item[1], dict)), None)
    return _first_layout(source, *first) if first else None  # type: ignore[arg-type]


def _first_layout(source: Source, number: int, columns: Columns) -> Format:
    layout = recognise(columns)
    if preferences := _preferences(layout, columns):
        raise source.bad_row(
            number,
            "preferences",
            f"holds preferences ({preferences}), and only supervised fine-tuning is done here",
            "keep the answers that are to be learned, as messages or as prompt and completion",
        )
    if layout is None:
        hint = f"accepted columns are: {ACCEPTED}"
        if len(columns) == 1:
            hint = next((f"{mend}; {hint}" for sign, mend in _UNPARTED.items() if sign in next(iter(columns))), hint)
        raise source.bad_row(number, "unknown_columns", f"has the columns {_listed(columns)}", hint)
    return layout


def _preferences(layout: Format | None, columns: Columns) -> str:
    """Return the columns that make a row one of preferences, in OpenAI's layout or TRL's two; nothing for others."""
    if layout is None:
        pairs = (("preferred_output", "non_preferred_output"), ("chosen", "rejected"))
        return next((" and ".join(pair) for pair in pairs if columns.keys() >= set(pair)), "")
    judged = layout.name == "prompt/completion" and isinstance(columns.get("label"), bool)
    return "completion and label" if judged else ""


def _parse(source: Source, layout: Format, number: int, columns: Columns) -> Row | BadRows:
    missing = [name for name in layout.needs if name not in columns]
    if missing:
        return source.bad_row(
            number,
            "missing_column",
            f"has no column {' or '.join(map(repr, missing))}; it has {_listed(columns)}, "
            f"and the rows before it are of the format {layout.name}",
            "keep one format per file",
        )
    try:
        return layout.read(number, columns)
    except BadColumn as error:
        return source.bad_row(number, error.code, error.message, error.hint, error.where)


def _listed(columns: Columns) -> str:
    names = [repr(name if len(name) <= 40 else name[:40] + "…") for name in columns]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more if names else "none"
