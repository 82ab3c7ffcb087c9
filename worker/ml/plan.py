"""Decides which characters of a row carry loss.

A conversation is rendered up to an answer, and up to its end. Where the chat template renders these as prefixes of the
whole conversation (checked for every turn of every row), the difference is the answer. Where it does not, `auto` asks
the template's own generation markers, then tries the last turn alone, and at last trains on the whole text; a loss that
was asked for by name is refused instead.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from worker.data.rows import Message, Row
from worker.ml.paths import ChatWriter

Asked = Literal["auto", "all", "completion", "assistant"]
Loss = Literal["completion", "assistant", "last_turn", "whole"]
Span = tuple[int, int]
# Each answer is found by tokenising all that comes before it: answers times characters, in one row.
_WORK_CHARS = 64 << 20
_MARKER = re.compile(r"\{%-?\s*generation\b")
_OTHER_LOSS = 'set hyperparameters.loss to "auto" or "all", or use a chat_template that marks {% generation %}'


class BadTurn(ValueError):
    """A row cannot be rendered, or not with the loss that was asked for; `hint` says what to do."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Plan:
    """A row's text, and (start, end) in characters for each stretch that carries loss.

    `ids` and `mask` are set instead of `spans` where the template's markers gave them. `special`: the tokenizer adds
    its special tokens to the text, because no template wrote them.
    """

    text: str
    spans: tuple[Span, ...] = ()
    loss: Loss = "whole"
    special: bool = False
    ids: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Chat:
    # A conversation, the form of its turns that the template knows, and what it makes of them.
    row: Row
    turns: list[dict[str, Any]]
    text: str


class Planner:
    """Renders rows by the chat template of a tokenizer, and says where their loss is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss: Asked = "auto"):
        self._tokenizer = tokenizer
        self._loss = loss
        self._writer = ChatWriter(tokenizer)
        self._template = str(tokenizer.chat_template)
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._endings = tuple({*tokenizer.all_special_tokens, *added} - {""})
        self._marked = bool(_MARKER.search(self._template))

    def plan(self, row: Row) -> Plan:
        """Return the plan for `row`.

        Raises:
            BadTurn: the chat template refuses the conversation, or does not tell apart what the loss is asked on.
        """
        if not row.messages:
            return self._plan_text(row)
        turns = [self._known_role(message) for message in row.messages]
        chat = _Chat(row, turns, self._template_text(turns, row))
        _check_kept(row.messages, chat.text)
        if self._loss == "all":
            return self._whole(chat)
        if row.kind == "completion" and self._loss != "assistant":
            return self._completion(chat)
        return self._last_answer(chat) if self._loss == "completion" else self._answers(chat)

    def _plan_text(self, row: Row) -> Plan:
        if row.kind == "text":
            if self._loss in ("completion", "assistant"):
                raise BadTurn("is one text, without a completion", 'set hyperparameters.loss to "all" or "auto"')
            text = self._ended(row.text)
            return Plan(text, ((0, len(text)),), special=True)
        if self._loss == "assistant":
            raise BadTurn("has no assistant turns", 'set hyperparameters.loss to "completion" or "auto"')
        text = self._ended(row.prompt + row.completion)
        if self._loss == "all":
            return Plan(text, ((0, len(text)),), special=True)
        return Plan(text, ((len(row.prompt), len(text)),), "completion", special=True)

    def _whole(self, chat: _Chat) -> Plan:
        return Plan(chat.text, _without((0, len(chat.text)), self._muted(chat)))

    def _completion(self, chat: _Chat) -> Plan:
        span = self._span(chat, chat.row.num_prompt, len(chat.turns))
        if span:
            return Plan(chat.text, _without(span, self._muted(chat, chat.row.num_prompt)), "completion")
        if self._loss == "completion":
            raise BadTurn("the chat template does not tell where the completion begins", _OTHER_LOSS)
        return self._whole(chat)

    def _last_answer(self, chat: _Chat) -> Plan:
        last = max(index for index, message in enumerate(chat.row.messages) if message.role == "assistant")
        if not chat.row.messages[last].trained:
            raise BadTurn(f"messages[{last}], the last answer, has weight 0", 'set hyperparameters.loss to "assistant"')
        span = self._span(chat, last, last + 1)
        if span is None:
            raise BadTurn(
                f"the chat template does not tell where messages[{last}], the last answer, begins", _OTHER_LOSS
            )
        return Plan(chat.text, (span,), "completion")

    def _answers(self, chat: _Chat) -> Plan:
        messages, text = chat.row.messages, chat.text
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if len(answers) * len(text) > _WORK_CHARS:
            raise BadTurn(
                f"{len(answers):,} assistant turns in {len(text):,} characters are too much work to label",
                "split it into several rows",
            )
        # A greeting that comes first answers nothing: it is read, like a prompt.
        spans = {index: self._span(chat, index, index + 1) for index in answers if index or len(answers) == 1}
        if all(spans.values()):
            trained = tuple(span for index, span in spans.items() if messages[index].trained and span)
            if trained:
                return Plan(text, trained, "assistant")
        if self._marked and all(messages[index].trained for index in answers):
            marked = self._marked_plan(chat)
            if marked:
                return marked
        if self._loss == "assistant":
            raise BadTurn("the chat template does not tell the assistant's turns apart", _OTHER_LOSS)
        last = spans[answers[-1]]
        return Plan(text, (last,), "last_turn") if last and messages[answers[-1]].trained else self._whole(chat)

    def _marked_plan(self, chat: _Chat) -> Plan | None:
        encoded: Any = self._tokenizer.apply_chat_template(
            chat.turns,
            tools=list(chat.row.tools) or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = tuple(encoded["assistant_masks"])
        return Plan(chat.text, ids=tuple(encoded["input_ids"]), mask=mask, loss="assistant") if any(mask) else None

    def _span(self, chat: _Chat, start: int, end: int) -> Span | None:
        # The characters before and up to the end of turns[start:end], if both are prefixes of the whole.
        if not start:
            return None  # nothing comes before it that an answer could follow
        found = self._extent(chat, start, end, prompt=True)
        if found is None:
            return None
        # What follows the end-of-turn token (ChatML: a newline) is never generated, so it is not learnt either.
        trimmed = chat.text[: found[1]].rstrip()
        upto = len(trimmed) if trimmed.endswith(self._endings) else found[1]
        return (found[0], upto) if found[0] < upto else None

    def _muted(self, chat: _Chat, start: int = 0) -> list[Span]:
        # The turns of weight 0 from turn `start` on, with all that the template writes around them.
        spans = []
        for index, message in enumerate(chat.row.messages[start:], start):
            if not message.trained:
                found = self._extent(chat, index, index + 1)
                if found is None:
                    raise BadTurn(
                        f"the chat template does not tell messages[{index}], which has weight 0, from the rest",
                        "leave out its weight, or use another chat_template",
                    )
                spans.append(found)
        return spans

    def _extent(self, chat: _Chat, start: int, end: int, *, prompt: bool = False) -> Span | None:
        try:
            before = self._template_text(chat.turns[:start], chat.row, prompt=prompt) if start else ""
            upto = chat.text if end == len(chat.turns) else self._template_text(chat.turns[:end], chat.row)
        except BadTurn:
            return None
        fits = chat.text.startswith(before) and chat.text.startswith(upto)
        return (len(before), len(upto)) if fits and len(before) < len(upto) else None

    def _template_text(self, turns: list[dict[str, Any]], row: Row, *, prompt: bool = False) -> str:
        try:
            text = self._writer.write(turns, list(row.tools) or None, prompt=prompt)
        except Exception as error:  # a template is a program of its author: it raises what it likes
            raise BadTurn(
                f"the chat template refuses this conversation: {error}",
                "mind the order of roles and whether the base knows a system role",
            ) from error
        if len(text) > _WORK_CHARS:
            raise BadTurn(
                f"the chat template makes {len(text):,} characters of it", "use another chat_template or base"
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


def _without(span: Span, muted: list[Span]) -> tuple[Span, ...]:
    """Return what is left of `span` after the `muted` stretches, which are in order, are taken out."""
    left, start = [], span[0]
    for begin, end in muted:
        if start < begin:
            left.append((start, min(begin, span[1])))
        start = max(start, end)
    if start < span[1]:
        left.append((start, span[1]))
    return tuple(left)


def _check_kept(messages: tuple[Message, ...], text: str) -> None:
    # Some templates pass over roles that they do not know without a word.
    for index, message in enumerate(messages):
        content = message.content.strip()
        if message.role in ("user", "assistant") or not content or content in text:
            continue
        if json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            raise BadTurn(
                f"messages[{index}]: the chat template leaves out the role {message.role!r}",
                "put that text into a user turn, or use a chat_template or base that knows the role",
            )
