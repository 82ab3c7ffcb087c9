"""Turns rows into token ids and labels, as their plans say. Label -100 means: no loss on this token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from worker.data.rows import Row
from worker.data.source import Problems, Source
from worker.ml.plan import Asked, BadTurn, Loss, Plan, Planner

NO_LOSS = -100
# Rows are tokenised together, up to so many, or up to so many characters: tokens take some forty times the memory.
_BATCH = 64
_BATCH_CHARS = 1 << 20


@dataclass(frozen=True)
class Example:
    """One tokenised row: `input_ids` and `labels` have the same length, at most `max_length`.

    `plain`: it is text that no chat template wrote.
    """

    number: int
    input_ids: list[int]
    labels: list[int]
    loss: Loss
    num_cut: int
    plain: bool = False

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss. The first token of a row has nothing before it to be predicted from."""
        return sum(label != NO_LOSS for label in self.labels[1:])


class Renderer:
    """Renders rows by the chat template of a tokenizer and cuts them to `max_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, loss: Asked = "auto"):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._planner = Planner(tokenizer, loss)

    def render(self, source: Source, rows: Iterable[Row], problems: Problems | None = None) -> Iterator[Example]:
        """Yield an example for each row, in order.

        Args:
            problems: takes the rows that cannot be rendered; without it the first one raises InvalidInput.
        """
        plans: list[tuple[Row, Plan]] = []
        for row in rows:
            try:
                plans.append((row, self._planner.plan(row)))
            except BadTurn as error:
                failure = source.bad_row(row.number, str(error), error.hint)
                if problems is None:
                    raise failure from error
                problems.add(failure)
            if len(plans) == _BATCH or sum(len(plan.text) for _, plan in plans) > _BATCH_CHARS:
                yield from self._encode(plans)
                plans = []
        yield from self._encode(plans)

    def _encode(self, plans: list[tuple[Row, Plan]]) -> Iterator[Example]:
        wholes = list(self._tokenize((plan.text, plan.special) for _, plan in plans))
        ends = self._token_ends([plan for _, plan in plans], wholes)
        for index, (row, plan) in enumerate(plans):
            whole = wholes[index]
            if plan.mask:
                whole = list(plan.ids)
                labels = [token if bit else NO_LOSS for token, bit in zip(whole, plan.mask, strict=True)]
            else:
                labels = [NO_LOSS] * len(whole)
                for before, upto in plan.spans:
                    start, end = (ends.get((index, cut), len(whole)) for cut in (before, upto))
                    labels[start:end] = whole[start:end]
            cut = self._max_length
            yield Example(row.number, whole[:cut], labels[:cut], plan.loss, max(0, len(whole) - cut), plan.special)

    def _token_ends(self, plans: list[Plan], wholes: list[list[int]]) -> dict[tuple[int, int], int]:
        # (index of the plan, characters of its text) -> how many of its tokens these characters are. Left out is what
        # lies beyond `max_length` tokens, and is cut off: a conversation of a thousand turns would cost its square.
        ends = {(index, 0): 0 for index in range(len(plans))}
        ends |= {(index, len(plan.text)): len(wholes[index]) for index, plan in enumerate(plans)}
        cuts = sorted({(index, cut) for index, plan in enumerate(plans) for span in plan.spans for cut in span})
        full: set[int] = set()
        asked: list[tuple[int, int]] = []

        def texts() -> Iterator[tuple[str, bool]]:
            for index, cut in cuts:
                if (index, cut) not in ends and index not in full:
                    asked.append((index, cut))
                    yield plans[index].text[:cut], plans[index].special

        for number, ids in enumerate(self._tokenize(texts())):
            index, cut = asked[number]
            ends[index, cut] = common_prefix(ids, wholes[index])
            if ends[index, cut] >= self._max_length:
                full.add(index)
        return ends

    def _tokenize(self, texts: Iterable[tuple[str, bool]]) -> Iterator[list[int]]:
        # In order, many at once. Chat templates write the special tokens themselves; plain text gets those that the
        # tokenizer adds.
        chunk: list[str] = []
        chars, kind = 0, False
        for text, special in texts:
            if chunk and (special != kind or chars + len(text) > _BATCH_CHARS):
                yield from self._ids(chunk, kind)
                chunk, chars = [], 0
            chunk.append(text)
            chars, kind = chars + len(text), special
        if chunk:
            yield from self._ids(chunk, kind)

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return found


def common_prefix(prefix: list[int], whole: list[int]) -> int:
    """Return how many tokens the two begin with in common.

    Less than the prefix where tokens merge across its end; the merged token is then part of what follows.
    """
    if whole[: len(prefix)] == prefix:
        return len(prefix)
    pairs = enumerate(zip(prefix, whole, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(prefix), len(whole)))
