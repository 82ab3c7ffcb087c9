"""Counts what a dataset comes to in tokens: what is trained on, what is cut off, how long the rows are."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy

from common.errors import InvalidInput
from worker.data.rows import Row
from worker.ml.render import Example

_LOSS_WORDS = {
    "completion": "on the completion only",
    "assistant": "on the assistant's turns only",
    "last_turn": "on the last assistant turn only: the chat template rewrites the earlier ones",
    "whole": "on the whole text",
}


@dataclass
class Census:
    """Sums over the examples of one file. Lengths are in tokens, after the cut; `highest` is the highest token.

    `plain`: the rows are texts, no conversations. The first row of a file decides that for all. `turns` counts by role,
    `empty_rows` those in which a turn or the prompt is empty, where that is allowed; `contents` has a hash of each row.
    """

    max_length: int
    rows: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    longest: int = 0
    highest: int = 0
    plain: bool = False
    losses: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    empty_rows: int = 0
    contents: array[int] = field(default_factory=lambda: array("q"))

    def add(self, example: Example) -> bool:
        """Count `example`; returns whether it is kept: a row whose answer was cut off entirely teaches nothing."""
        length, trained = len(example.input_ids), example.num_trained
        self.cut_rows += example.num_cut > 0
        self.cut_tokens += example.num_cut
        self.longest = max(self.longest, length + example.num_cut)
        self.highest = max(self.highest, *example.input_ids)
        self.plain = example.plain
        self.contents.append(example.content)
        messages = example.row.messages
        for message in messages:
            self.turns[message.role] += 1
        blank = not all(message.content.strip() for message in messages) if messages else not _begin(example.row)
        self.empty_rows += blank
        if not trained:
            self.dropped += 1
            return False
        self.rows += 1
        self.tokens += length
        self.trained_tokens += trained
        self.losses[example.loss] += 1
        self.lengths[(length - 1).bit_length()] += 1
        return True

    def merge(self, other: Census) -> None:
        """Add what was counted in other rows of the same file."""
        for name in ("rows", "dropped", "tokens", "trained_tokens", "cut_rows", "cut_tokens", "empty_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest, self.highest = max(self.longest, other.longest), max(self.highest, other.highest)
        self.plain = self.plain or other.plain
        self.losses += other.losses
        self.lengths += other.lengths
        self.turns += other.turns
        self.contents += other.contents

    @property
    def duplicates(self) -> int:
        """Rows that say what another row has said before."""
        return len(self.contents) - len(numpy.unique(numpy.frombuffer(self.contents, dtype=numpy.int64)))

    def require_something(self, param: str) -> None:
        """Raise InvalidInput if no row has a token to learn."""
        if self.rows:
            return
        raise InvalidInput(
            f"{param}: none of the {self.dropped:,} rows has a token to learn within max_length {self.max_length}",
            code="nothing_to_train",
            param=param,
            hint=f"raise hyperparameters.max_length (the longest row has {self.longest:,} tokens), or shorten prompts",
        )

    @property
    def cut_share(self) -> float:
        """Share of the rows that were cut."""
        return self.cut_rows / max(1, self.rows + self.dropped)

    def loss_sentence(self) -> str:
        """Return in words which tokens carry loss, with the number of rows where it differs between them."""
        parts = [(_LOSS_WORDS[name], count) for name, count in self.losses.most_common()]
        if len(parts) == 1:
            return f"the loss is {parts[0][0]}"
        return "the loss is " + "; ".join(f"{words} ({count:,} rows)" for words, count in parts)

    def report(self) -> dict[str, Any]:
        """Return the counts as JSON. The histogram maps an upper bound of the length to a number of rows."""
        return {
            "rows": self.rows,
            "rows_dropped": self.dropped,
            "rows_duplicate": self.duplicates,
            "rows_empty": self.empty_rows,
            "turns": dict(self.turns),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "rows_cut": self.cut_rows,
            "cut_share": round(self.cut_share, 6),
            "tokens_cut": self.cut_tokens,
            "longest_row_tokens": self.longest,
            "max_length": self.max_length,
            "loss": dict(self.losses),
            "length_histogram": {str(2**power): self.lengths[power] for power in sorted(self.lengths)},
        }


def _begin(row: Row) -> str:
    # What a row without turns begins with: only a prompt may be empty.
    return (row.prompt if row.kind == "completion" else row.text).strip()
