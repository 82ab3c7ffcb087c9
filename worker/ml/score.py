"""Means over an evaluation, per trained token: the library's own depend on how the rows fall into batches."""

from __future__ import annotations

from collections import defaultdict


class Score:
    """Adds up the batches of an evaluation."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: defaultdict[str, float] = defaultdict(float)

    def add(self, tokens: int, means: dict[str, float]) -> None:
        """Take the means of one batch over its `tokens` trained tokens."""
        self._tokens += tokens
        for name, mean in means.items():
            self._sums[name] += mean * tokens

    def means(self) -> dict[str, float]:
        """Return the means over all trained tokens."""
        return {name: total / max(1, self._tokens) for name, total in self._sums.items()}
