"""Turns rows into token ids and labels, as their plans say. Label -100 means: no loss on this token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from worker.data.rows import Row
from worker.data.source import Problems, Source
from worker.ml.encode import BATCH_CHARS, Encoder
from worker.ml.plan import Asked, BadTurn, Loss, Plan, Planner, Span

NO_LOSS = -100
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row, cut to `max_length`; `spans` are the stretches of its tokens that carry loss.

    `plain`: it is text that no chat template wrote.
    """

    row: Row
    input_ids: list[int]
    spans: tuple[Span, ...]
    loss: Loss
    num_cut: int
    plain: bool = False
    # The same for rows that read the same and are learnt in the same places; another in each run.
    content: int = 0

    @property
    def labels(self) -> list[int]:
        """The tokens to be predicted, as long as `input_ids`."""
        labels = [NO_LOSS] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss. The first token of a row has nothing before it to be predicted from."""
        return sum(max(0, end - max(start, 1)) for start, end in self.spans)


class Renderer:
    """Renders rows by the chat template of a tokenizer and cuts them to `max_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, loss: Asked = "auto"):
        self._max_length = max_length
        self._planner = Planner(tokenizer, loss)
        self._encoder = Encoder(tokenizer, max_length)

    def render(self, source: Source, rows: Iterable[Row], problems: Problems | None = None) -> Iterator[Example]:
        """Yield an example for each row, in order.

        Args:
            problems: takes the rows that cannot be rendered; without it the first one raises InvalidInput.
        """
        plans: list[tuple[Row, Plan]] = []
        chars = 0
        for row in rows:
            try:
                plans.append((row, self._planner.plan(row)))
                chars += len(plans[-1][1].text)
            except BadTurn as error:
                failure = source.bad_row(row.number, "cannot_render", str(error), error.hint)
                if problems is None:
                    raise failure from error
                problems.add(failure)
            if len(plans) == _BATCH or chars > BATCH_CHARS:
                yield from self._encode(plans)
                plans, chars = [], 0
        yield from self._encode(plans)

    def _encode(self, plans: list[tuple[Row, Plan]]) -> Iterator[Example]:
        cut = self._max_length
        found = self._encoder.encode([plan for _, plan in plans])
        for (row, plan), (ids, spans) in zip(plans, found, strict=True):
            within = tuple((start, min(end, cut)) for start, end in spans if start < min(end, cut))
            content = hash((plan.text, plan.spans, plan.mask))
            yield Example(row, ids[:cut], within, plan.loss, max(0, len(ids) - cut), plan.special, content)
