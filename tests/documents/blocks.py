"""Reads the examples out of the documents: fenced blocks, each with what a comment before it says of it.

<!-- its own terminal -->       a server: it is started, and goes on while the rest of the document runs
<!-- not run: REASON -->        needs what a test does not have
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"(?:^<!-- (?P<remark>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_NOT_RUN = "not run: "
OWN_TERMINAL = "its own terminal"


@dataclass(frozen=True)
class Block:
    """One fenced block. `why_not` says why it is not run; `line` is where it begins, from 1."""

    line: int
    language: str
    text: str
    server: bool
    why_not: str | None


def blocks(document: Path) -> list[Block]:
    """Return the blocks of a Markdown file that name a language, in order."""
    content = document.read_text()
    return [_block(content, match) for match in _FENCE.finditer(content)]


def _block(content: str, match: re.Match[str]) -> Block:
    remark = match["remark"] or ""
    return Block(
        line=content.count("\n", 0, match.start("text")),
        language=match["language"],
        text=match["text"],
        server=remark == OWN_TERMINAL,
        why_not=remark.removeprefix(_NOT_RUN) if remark.startswith(_NOT_RUN) else None,
    )
