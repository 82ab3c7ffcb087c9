"""Answers that are written together: which go into a batch, and the batch itself, token by token."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from worker.serve.engine.answer import Answer
from worker.serve.engine.shared import SharedBase

# Below this the likeliest token is taken as it is: the quotients would leave the range of the numbers.
_COLDEST = 1e-4


def choose(waiting: Sequence[Answer], shared: SharedBase, max_rows: int, max_tokens: int) -> list[Answer]:
    """Return the answers to write next: the first, and those behind it that may and can go with it.

    Args:
        max_tokens: of the whole batch, padding included; a first answer that is longer goes by itself.
    """
    first = waiting[0]
    chosen: list[Answer] = []
    for answer in waiting:
        adapter = answer.ask.adapter
        fits = adapter == first.ask.adapter or (
            shared.shares_batches(adapter) and shared.shares_batches(first.ask.adapter)
        )
        if fits and (not chosen or _num_tokens([*chosen, answer]) <= max_tokens):
            chosen.append(answer)
        if len(chosen) == max_rows:
            break
    return chosen


def _num_tokens(answers: Sequence[Answer]) -> int:
    longest = max(len(answer.prompt) for answer in answers) + max(answer.max_tokens for answer in answers)
    return len(answers) * longest


def write(
    answers: Sequence[Answer], shared: SharedBase, pad_id: int, device: torch.device, cancelled: Callable[[str], bool]
) -> None:
    """Write all answers to their ends, in one batch."""
    ids, mask = left_padded([answer.prompt for answer in answers], pad_id)
    config = GenerationConfig(
        max_new_tokens=max(answer.max_tokens for answer in answers), do_sample=False, pad_token_id=pad_id
    )
    with shared.wearing([answer.ask.adapter for answer in answers]) as (model, adapters):
        model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choosing(answers, device)]),
            stopping_criteria=StoppingCriteriaList([_Ending(answers, cancelled)]),
            **adapters,
        )


def left_padded(prompts: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts and their attention mask, each [rows, longest], so that all end at the same column."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


class _Choosing(LogitsProcessor):
    """Chooses the next token of the rows that are sampled, each by its own temperature, top_p and seed.

    The library's own sampling has one of each for a whole batch. The others keep their scores: the greatest is taken.
    """

    def __init__(self, answers: Sequence[Answer], device: torch.device):
        self._rows = [
            (row, answer, _warpers(answer), _generator(answer, device))
            for row, answer in enumerate(answers)
            if answer.ask.temperature > _COLDEST
        ]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return `scores`, [rows, vocabulary], with the chosen token of each sampled row above all others."""
        for row, answer, warpers, generator in self._rows:
            if not answer.finished:
                own = warpers(input_ids, scores[row : row + 1]).softmax(-1)
                # An adapter of NaN makes nonsense of its own answer; an error here would end everybody's.
                chosen = torch.multinomial(own.nan_to_num(nan=1.0), 1, generator=generator)
                scores[row, chosen[0]] = torch.inf
        return scores


def _warpers(answer: Answer) -> LogitsProcessorList:
    warpers: list[Any] = [TemperatureLogitsWarper(answer.ask.temperature)]
    if answer.ask.top_p < 1:
        warpers.append(TopPLogitsWarper(answer.ask.top_p))
    return LogitsProcessorList(warpers)


def _generator(answer: Answer, device: torch.device) -> torch.Generator:
    seed = answer.ask.seed if answer.ask.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)


class _Ending(StoppingCriteria):
    """Hands each row its new token, and ends the rows that are finished or that nobody waits for."""

    def __init__(self, answers: Sequence[Answer], cancelled: Callable[[str], bool]):
        self._answers = answers
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        """Return which rows are at their end, [rows]."""
        for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
            if answer.finished:
                continue
            if self._cancelled(answer.ask.id):
                answer.cancel()
            else:
                answer.take(token)
        done: Any = torch.tensor([answer.finished for answer in self._answers], device=input_ids.device)
        return done
