"""The fixed prompts that a model in training is asked at each checkpoint: the request's own, or validation rows'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import InvalidInput
from worker.ml.base_check import BaseFacts
from worker.ml.render import NO_LOSS

ANSWER_TOKENS = 64
_HELD_OUT = 4


@dataclass(frozen=True)
class Prompt:
    """What is asked, as text and as tokens; `expected` is what a validation row answers."""

    text: str
    ids: list[int]
    expected: str | None = None


def read_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], facts: BaseFacts, *, plain: bool
) -> list[Prompt]:
    """Return the prompts of a request.

    Args:
        plain: the training rows are no conversations, so neither are these: each is a text to go on with.

    Raises:
        InvalidInput: one is too long for the base's context, or the chat template refuses it.
    """
    prompts = []
    for index, text in enumerate(texts):
        ids = _encode(tokenizer, text, f"sample_prompts.{index}", plain)
        if facts.context is not None and len(ids) > facts.context - ANSWER_TOKENS:
            raise _bad(
                f"sample_prompts.{index}",
                f"has {len(ids):,} tokens, which leaves no room for an answer within {facts.context:,}",
                "shorten it",
            )
        if facts.vocab_size is not None and max(ids) >= facts.vocab_size:
            raise _bad(f"sample_prompts.{index}", f"holds the token {max(ids):,}, which the base lacks", "take it out")
        prompts.append(Prompt(text, ids))
    return prompts


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, param: str, plain: bool) -> list[int]:
    try:
        found: Any = (
            tokenizer(text, verbose=False)
            if plain
            else tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=True
            )
        )
    except Exception as error:  # a template is a program of its author: it raises what it likes
        raise _bad(param, f"is refused by the chat template: {error}", "leave out sample_prompts") from error
    ids = list(found["input_ids"])
    if not ids:
        raise _bad(param, "is no token", "write a prompt")
    return ids


def _bad(param: str, what: str, hint: str) -> InvalidInput:
    return InvalidInput(f"{param}: {what}", code="bad_prompt", param=param, hint=hint)


def held_out_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, list[int]]], facts: BaseFacts
) -> list[Prompt]:
    """Return the first validation rows up to their last answer; of a row that is trained on as a whole, its first half.

    Args:
        rows: `input_ids` and `labels` of each.
    """
    room = None if facts.context is None else max(1, facts.context - ANSWER_TOKENS)
    prompts: list[Prompt] = []
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        start, end = _last_answer(labels)
        asked = ids[:start]
        if room is None or len(asked) <= room:
            texts = [str(tokenizer.decode(part, skip_special_tokens=True)).strip() for part in (asked, ids[start:end])]
            prompts.append(Prompt(texts[0], asked, texts[1]))
        if len(prompts) == _HELD_OUT:
            break
    return prompts


def _last_answer(labels: list[int]) -> tuple[int, int]:
    """Return where the last stretch with loss begins and ends; at least one token is before it."""
    end = max(index + 1 for index, label in enumerate(labels) if label != NO_LOSS)
    start = end
    while start and labels[start - 1] != NO_LOSS:
        start -= 1
    # The first token of a row is never learnt.
    return (start, end) if start > 1 else (max(1, end // 2), end)
