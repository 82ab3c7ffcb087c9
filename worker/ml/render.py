"""Turns rows into token ids and labels. Label -100 means: no loss on this token.

Which tokens carry loss is found by rendering a conversation twice: up to an answer, and up to its end. Where the chat
template renders these as prefixes of the whole conversation (checked for every turn of every row), the difference is
the answer. Where it does not, the template's own generation markers are asked, then the last turn alone is tried, and
at last the whole text is trained on; the counts of each are reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from worker.data.rows import Message, Row
from worker.data.source import Problems, Source

Loss = Literal["completion", "assistant", "last_turn", "whole"]
NO_LOSS = -100
# Rows are tokenised together, up to so many, or up to so many characters: tokens take some forty times the memory.
_BATCH = 64
_BATCH_CHARS = 1 << 20
# Each answer is found by tokenising all that comes before it: answers times characters, in one row.
_WORK_CHARS = 64 << 20
_MARKER = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Example:
    """One tokenised row: `input_ids` and `labels` have the same length, at most `max_length`."""

    number: int
    input_ids: list[int]
    labels: list[int]
    loss: Loss
    num_cut: int

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss. The first token of a row has nothing before it to be predicted from."""
        return sum(label != NO_LOSS for label in self.labels[1:])


@dataclass(frozen=True)
class _Plan:
    # Text of a row, and (start, end) in characters for each stretch that carries loss. `ids` and `mask` are set
    # instead where the template's markers gave them.
    text: str
    spans: tuple[tuple[int, int], ...] = ()
    loss: Loss = "whole"
    special: bool = False
    ids: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()


class Renderer:
    """Renders rows by the chat template of a tokenizer and cuts them to `max_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._template = str(tokenizer.chat_template)
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._endings = tuple({*tokenizer.all_special_tokens, *added} - {""})
        self._marked = bool(_MARKER.search(self._template))

    def render(self, source: Source, rows: Iterable[Row], problems: Problems | None = None) -> Iterator[Example]:
        """Yield an example for each row, in order.

        Args:
            problems: takes the rows that the chat template refuses; without it the first one raises InvalidInput.
        """
        plans: list[tuple[Row, _Plan]] = []
        for row in rows:
            try:
                plans.append((row, self._plan(row)))
            except BadTurn as error:
                failure = source.bad_row(row.number, str(error), error.hint)
                if problems is None:
                    raise failure from error
                problems.add(failure)
            if len(plans) == _BATCH or sum(len(plan.text) for _, plan in plans) > _BATCH_CHARS:
                yield from self._encode(plans)
                plans = []
        yield from self._encode(plans)

    def _plan(self, row: Row) -> _Plan:
        if row.kind == "text":
            return _Plan(self._ended(row.text), special=True)
        if not row.messages:
            whole = self._ended(row.prompt + row.completion)
            return _Plan(whole, ((len(row.prompt), len(whole)),), "completion", special=True)
        turns = [self._known_role(message) for message in row.messages]
        text = self._template_text(turns, row)
        _check_kept(row.messages, text)
        if row.kind == "completion":
            span = self._span(turns, row, text, row.num_prompt, len(turns))
            return _Plan(text, (span,), "completion") if span else _Plan(text)
        return self._plan_chat(row, turns, text)

    def _plan_chat(self, row: Row, turns: list[dict[str, Any]], text: str) -> _Plan:
        answers = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
        if len(answers) * len(text) > _WORK_CHARS:
            raise BadTurn(
                f"{len(answers):,} assistant turns in {len(text):,} characters are too much work to label",
                "split it into several rows",
            )
        spans = {index: self._span(turns, row, text, index, index + 1) for index in answers}
        trained = tuple(span for index, span in spans.items() if row.messages[index].trained and span)
        if all(spans.values()):
            return _Plan(text, trained, "assistant")
        if self._marked and all(row.messages[index].trained for index in answers):
            return self._marked_plan(turns, row, text)
        last = spans[answers[-1]]
        if last and row.messages[answers[-1]].trained:
            return _Plan(text, (last,), "last_turn")
        return _Plan(text)

    def _marked_plan(self, turns: list[dict[str, Any]], row: Row, text: str) -> _Plan:
        encoded: Any = self._tokenizer.apply_chat_template(
            turns, tools=list(row.tools) or None, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = tuple(encoded["assistant_masks"])
        return _Plan(text, ids=tuple(encoded["input_ids"]), mask=mask, loss="assistant") if any(mask) else _Plan(text)

    def _span(self, turns: list[dict[str, Any]], row: Row, text: str, start: int, end: int) -> tuple[int, int] | None:
        # The characters before and up to the end of turns[start:end], if both are prefixes of the whole.
        if not start:
            return None  # nothing comes before it that an answer could follow
        try:
            before = self._template_text(turns[:start], row, prompt=True)
            upto = text if end == len(turns) else self._template_text(turns[:end], row)
        except BadTurn:
            return None
        # What follows the end-of-turn token (ChatML: a newline) is never generated, so it is not learnt either.
        trimmed = upto.rstrip()
        upto = trimmed if trimmed.endswith(self._endings) else upto
        if not (text.startswith(before) and text.startswith(upto) and len(before) < len(upto)):
            return None
        return len(before), len(upto)

    def _template_text(self, turns: list[dict[str, Any]], row: Row, *, prompt: bool = False) -> str:
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    turns, tools=list(row.tools) or None, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template is a program of the base's author: it raises what it likes
            raise BadTurn(
                f"the chat template of the base model refuses this conversation: {error}",
                "mind the order of roles and whether the base knows a system role",
            ) from error
        if len(text) > _WORK_CHARS:
            raise BadTurn(
                f"the chat template of the base model makes {len(text):,} characters of it", "use another base"
            )
        return text

    def _known_role(self, message: Message) -> dict[str, Any]:
        values = message.as_dict()
        if message.role == "developer" and "developer" not in self._template:
            values["role"] = "system"
        return values

    def _ended(self, text: str) -> str:
        eos = self._tokenizer.eos_token
        return text if text.endswith(eos) else text + eos

    def _encode(self, plans: list[tuple[Row, _Plan]]) -> Iterator[Example]:
        wholes = list(self._tokenize((plan.text, plan.special) for _, plan in plans))
        ends = self._token_ends([plan for _, plan in plans], wholes)
        for index, (row, plan) in enumerate(plans):
            whole = wholes[index]
            if plan.mask:
                whole = list(plan.ids)
                labels = [token if bit else NO_LOSS for token, bit in zip(whole, plan.mask, strict=True)]
            elif plan.spans:
                labels = [NO_LOSS] * len(whole)
                for before, upto in plan.spans:
                    start, end = (ends.get((index, cut), len(whole)) for cut in (before, upto))
                    labels[start:end] = whole[start:end]
            else:
                labels = list(whole)
            cut = self._max_length
            yield Example(row.number, whole[:cut], labels[:cut], plan.loss, max(0, len(whole) - cut))

    def _token_ends(self, plans: list[_Plan], wholes: list[list[int]]) -> dict[tuple[int, int], int]:
        # (index of the plan, characters of its text) -> how many of its tokens these characters are. Left out is what
        # lies beyond `max_length` tokens, and is cut off: a conversation of a thousand turns would cost its square.
        ends = {(index, len(plan.text)): len(wholes[index]) for index, plan in enumerate(plans)}
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


class BadTurn(ValueError):
    """The chat template cannot render a row."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


def _check_kept(messages: tuple[Message, ...], text: str) -> None:
    # Some templates pass over roles that they do not know without a word.
    for index, message in enumerate(messages):
        content = message.content.strip()
        if message.role in ("user", "assistant") or not content or content in text:
            continue
        if json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            raise BadTurn(
                f"messages[{index}]: the chat template of the base model leaves out the role {message.role!r}",
                "put that text into a user turn, or use a base whose template knows the role",
            )


def common_prefix(prefix: list[int], whole: list[int]) -> int:
    """Return how many tokens the two begin with in common.

    Less than the prefix where tokens merge across its end; the merged token is then part of what follows.
    """
    if whole[: len(prefix)] == prefix:
        return len(prefix)
    pairs = enumerate(zip(prefix, whole, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(prefix), len(whole)))
