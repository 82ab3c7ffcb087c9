"""Loads the base, then obeys: adapters come and go, and those who wait are answered together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from transformers import GenerationConfig, PreTrainedModel

from common.errors import InvalidInput, UserError
from common.schemas.jobs import JobSpec
from worker.ml.base import load_base
from worker.ml.base_check import BaseFacts
from worker.ml.precision import choose_precision, pick_device
from worker.serve.engine.answer import Answer
from worker.serve.engine.batch import choose, write
from worker.serve.engine.inbox import Inbox
from worker.serve.engine.prompts import Prompts
from worker.serve.engine.shared import SharedBase
from worker.serve.engine.turns import Turns
from worker.serve.protocol import (
    Accepted,
    Ask,
    Command,
    Finished,
    Load,
    Loaded,
    Message,
    Ready,
    Refused,
    ServeSpec,
    Unload,
)


class Engine:
    """The base of `spec`, which `facts` are about, and what is asked of it.

    Raises:
        InvalidInput: it cannot be loaded.
    """

    def __init__(self, spec: ServeSpec, facts: BaseFacts, inbox: Inbox, say: Callable[[Message], None]):
        self._spec = spec
        self._inbox = inbox
        self._say = say
        self._waiting: list[Answer] = []
        self._turns = Turns()
        folder = Path(spec.base.path)
        self._context = facts.context
        self._device = pick_device(spec.device)
        torch.set_num_threads(spec.threads or len(os.sched_getaffinity(0)))
        self._prompts = Prompts(folder, facts.vocab_size, facts.context)
        # A base that is stored in 4 bit can be held in no other way.
        job = _as_a_job(spec, "qlora" if facts.quantized else spec.method)
        precision = choose_precision(job, self._device)
        base = load_base(folder, job, facts, precision, self._device).model
        self._end_ids = _end_ids(base, self._prompts)
        _forget_tastes(base)
        self._shared = SharedBase(base)
        kind = f"{'4-bit, ' if job.method == 'qlora' else ''}{str(precision.compute).removeprefix('torch.')}"
        say(Ready(self._context, str(self._device), kind, base.get_memory_footprint()))

    def run(self) -> NoReturn:
        """Obey for ever; the process ends with its parent, or by an error."""
        while True:
            self.step()

    def step(self) -> None:
        """Obey what was said, waiting for it if there is nothing to do, and write one batch."""
        for command in self._inbox.take(wait=not self._waiting):
            self._obey(command)
        for answer in self._waiting:
            if self._inbox.is_cancelled(answer.ask.id):
                answer.cancel()
        self._clear_finished()
        if self._waiting:
            ordered = self._turns.order(self._waiting)
            batch = choose(ordered, self._shared, self._spec.max_rows, self._spec.max_batch_tokens)
            self._turns.note(batch, self._waiting)
            pad_id = self._prompts.tokenizer.pad_token_id
            write(batch, self._shared, pad_id, self._device, self._inbox.is_cancelled)
            self._clear_finished()

    def _clear_finished(self) -> None:
        for answer in self._waiting:
            if answer.finished:
                self._inbox.forget(answer.ask.id)
        self._waiting = [answer for answer in self._waiting if not answer.finished]

    def _obey(self, command: Command) -> None:
        if isinstance(command, Unload):
            self._shared.unload(command.name)
            self._prompts.forget(command.name)
        elif isinstance(command, Load):
            self._or_refuse(command.name, lambda: self._load(command))
        elif isinstance(command, Ask):
            self._or_refuse(command.id, lambda: self._accept(command))

    def _or_refuse(self, of: str, obey: Callable[[], None]) -> None:
        try:
            obey()
        except UserError as error:
            self._say(Refused(of, error.code, error.message, error.hint, error.param))

    def _load(self, command: Load) -> None:
        parts = [(Path(folder), weight) for folder, weight in command.parts]
        num_bytes = self._shared.load(command.name, parts)
        self._prompts.learn(command.name, parts[0][0])
        self._say(Loaded(command.name, num_bytes))

    def _accept(self, ask: Ask) -> None:
        if self._inbox.is_cancelled(ask.id):
            self._inbox.forget(ask.id)
            self._say(Finished(ask.id, "cancelled", 0))
            return
        prompt = self._prompts.encode(ask.adapter, ask.messages)
        most = self._room(ask, len(prompt))
        answer = Answer(ask, prompt, most, self._prompts.tokenizer, self._end_ids, self._say)
        self._say(Accepted(ask.id, len(prompt)))
        self._waiting.append(answer)

    def _room(self, ask: Ask, num_prompt: int) -> int:
        """Return how long the answer may be, in tokens; raises InvalidInput where it cannot fit."""
        room = self._spec.max_tokens if self._context is None else self._context - num_prompt
        if room < (ask.max_tokens or 1):
            wanted = f" and {ask.max_tokens} for the answer" if ask.max_tokens else ""
            raise InvalidInput(
                f"messages: the model's context is {self._context} tokens; the messages have {num_prompt}{wanted}",
                code="context_length_exceeded",
                param="messages",
                hint="Shorten the messages, or ask for a shorter answer.",
            )
        return ask.max_tokens or min(room, self._spec.max_tokens)


def _as_a_job(spec: ServeSpec, method: str) -> JobSpec:
    """Return a job over this base: the base is held as a trainer would hold it, so the logits are a trainer's too."""
    held = {**spec.quantization, "load_in_4bit": method == "qlora"}
    return JobSpec.model_validate({"model": "base", "dataset": "dataset:none", "method": method, "quantization": held})


def _end_ids(base: PreTrainedModel, prompts: Prompts) -> frozenset[int]:
    named = base.generation_config.eos_token_id if base.generation_config else None
    listed = named if isinstance(named, list) else [named]
    return frozenset(number for number in (*listed, prompts.tokenizer.eos_token_id) if number is not None)


def _forget_tastes(base: PreTrainedModel) -> None:
    """Drop the sampling that the base's author recommends: what a request does not name has OpenAI's defaults."""
    base.generation_config = GenerationConfig()
    base.config.get_text_config().use_cache = True
