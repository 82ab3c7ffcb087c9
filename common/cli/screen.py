"""Write results: tables that fit the terminal, or JSON. What comes from a server is text, never markup or controls."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

# Output into a pipe or file is never cut.
_UNBOUNDED = 10_000
_STYLES = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "running": "cyan",
    "paused": "yellow",
    "idle": "green",
    "busy": "cyan",
    "gone": "red",
    "ok": "green",
    "warn": "yellow",
    "fail": "red",
}


def stdout() -> Console:
    """Return a console on standard output."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Return a console on standard error."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    from rich.console import Console

    console = Console(file=file, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def put(grid: RenderableType, console: Console) -> None:
    """Print a table. Into a pipe its lines end where their words do: filled up to the longest they would wrap."""
    if console.is_terminal:
        console.print(grid)
        return
    with console.capture() as captured:
        console.print(grid)
    console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def sentence(value: Any) -> str:
    """Return a value from outside as text without control characters, on which terminals act."""
    return "".join(character if character.isprintable() else " " for character in str(value))


def paragraph(value: Any) -> str:
    """Return a text from outside with its line breaks and tabs, but without the other control characters."""
    return "".join(character if character.isprintable() or character in "\n\t" else " " for character in str(value))


def hanging(line: str, console: Console, indent: int) -> str:
    """Return a line for `console`: on a terminal, what does not fit goes on under itself, behind `indent` blanks."""
    # As much again for the words, or there is no room for an indent.
    if not console.is_terminal or console.width < 2 * indent:
        return line
    return textwrap.fill(line, console.width, subsequent_indent=" " * indent, break_on_hyphens=False)


@dataclass(frozen=True)
class Column:
    """A column: its title, and the cell for a row. Columns with a higher `spare` leave first where room is short.

    `folded`: what does not fit goes on under itself instead of being cut.
    """

    title: str
    cell: Callable[[Any], Any]
    spare: int = 0
    styled: bool = False
    right: bool = False
    folded: bool = False


def table(columns: Sequence[Column], rows: Iterable[Any], console: Console | None = None) -> None:
    """Print a table. Columns that must not be spared are written whole; others are cut to what room there is."""
    from rich.table import Table
    from rich.text import Text

    console = console or stdout()
    rows = list(rows)
    cells = {column.title: [_text(column.cell(row)) for row in rows] for column in columns}
    shown = _fitting(columns, cells, console.width)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        justify: Any = "right" if column.right else "left"
        grid.add_column(column.title, no_wrap=not column.spare, overflow="ellipsis", justify=justify)

    def text(column: Column, value: str) -> Text:
        style = _STYLES.get(value, "") if column.styled else ""
        return Text(value, style=style, no_wrap=not column.folded, overflow="fold" if column.folded else "ellipsis")

    for number in range(len(rows)):
        grid.add_row(*(text(column, cells[column.title][number]) for column in shown))
    put(grid, console)


def _fitting(columns: Sequence[Column], cells: dict[str, list[str]], width: int) -> list[Column]:
    """Leave out the most spareable columns until the rest has ten characters each, first those without values."""
    shown = list(columns)

    def widest(column: Column) -> int:
        return max(map(len, [column.title, *cells[column.title]])) + 2

    def need(column: Column) -> int:
        return min(widest(column), 12) if column.spare else widest(column)

    if sum(map(widest, shown)) > width + 2:
        shown = [column for column in shown if not column.spare or any(cells[column.title])]
    while sum(map(need, shown)) > width and any(column.spare for column in shown):
        shown.remove(max(shown, key=lambda column: column.spare))
    return shown


def _text(value: Any) -> str:
    return "" if value is None else sentence(value)


def fields(pairs: Iterable[tuple[str, Any]], console: Console | None = None) -> None:
    """Print names and values, one pair a line; long values are wrapped under themselves. None is left out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in pairs:
        if value is not None and value != "":
            text = sentence(value)
            grid.add_row(Text(name, style="bold"), Text(text, style=_STYLES.get(text, ""), overflow="fold"))
    put(grid, console or stdout())


def as_json(value: Any) -> None:
    """Print a value, with pydantic models in it, as one JSON document."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def plain(value: Any) -> Any:
    """Return a value made of what JSON knows."""
    from pydantic import BaseModel

    from common.client.pages import Page

    if isinstance(value, BaseModel):
        # Without warnings: a newer server's answer may hold values that this version's types do not name.
        return value.model_dump(mode="json", warnings=False)
    if isinstance(value, Page):
        return {"data": [plain(item) for item in value], "has_more": value.has_more, "next": value.next}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def size(count: int | None) -> str:
    """Return a number of bytes for people: 1.4 GB."""
    if count is None:
        return ""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Return a time span for people: 0:42, 1:02:03."""
    if seconds is None:
        return ""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def ago(moment: datetime | None) -> str:
    """Return how long ago a moment was: 42s, 5m, 3h, 12d."""
    if moment is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for span, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * span:
            return f"{seconds / span:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"


def away(moment: datetime) -> str:
    """Return how far away a moment is: 5m ago, or in 2:00:00."""
    left = (moment - datetime.now(UTC)).total_seconds()
    return f"in {duration(left)}" if left >= 1 else ago(moment)


def result(value: BaseModel | Any, as_json_wanted: bool, show: Callable[[Any], None]) -> None:
    """Print a result in the form that was asked for."""
    if as_json_wanted:
        as_json(value)
    else:
        show(value)
