"""Rows as a model will see them, in a terminal: what is trained on is green, or between ⟦ and ⟧ without colour."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from common.cli import screen
from common.schemas.previews import Preview, PreviewedRow

if TYPE_CHECKING:
    from rich.console import Console

_TRAINED, _READ = "bold green", "dim"


def show(preview: Preview, console: Console | None = None) -> None:
    """Print the rows of `preview`, and what is wrong with others."""
    out = console or screen.stdout()
    for row in preview.rows:
        out.print(_title(row), style="bold")
        _print(row, out)
        out.print()
    for problem in preview.problems:
        out.print(screen.sentence(problem), style="red")
    if not preview.rows:
        out.print("no row to show", style="yellow")
    if preview.template == "plain":
        out.print("the base has no chat template: a plain one is used, and saved with the adapter", style="yellow")
    if preview.has_more and preview.rows:
        out.print(f"more: --offset {preview.offset + len(preview.rows)}", style="dim")


def _title(row: PreviewedRow) -> str:
    cut = f" · {row.num_cut:,} cut off" if row.num_cut else ""
    return f"row {row.row} · {row.num_tokens:,} tokens, {row.num_trained:,} trained on · loss: {row.loss}{cut}"


def _print(row: PreviewedRow, out: Console) -> None:
    from rich.text import Text

    text, coloured = Text(), out.color_system is not None
    for trained, tokens in groupby(row.tokens, lambda token: token.trained):
        stretch = screen.paragraph("".join(token.text for token in tokens))
        if trained and not coloured:
            stretch = f"⟦{stretch}⟧"
        text.append(stretch, style=_TRAINED if trained else _READ)
    left = row.num_tokens - len(row.tokens)
    if left > 0:
        text.append(f" … {left:,} more tokens", style="yellow")
    out.print(text)
