"""Asks a model in training, and leaves it as it was: the run goes on to the same bits as if nobody had asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from worker.ml.prompts import ANSWER_TOKENS, Prompt


@contextmanager
def set_aside(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into eval mode in the block; afterwards every module's mode and all random states are as before."""
    training = [module for module in model.modules() if module.training]
    devices = [device for device in {item.device for item in model.parameters()} if device.type == "cuda"]
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def answer(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return what `model` answers to `prompt`, decoded greedily, at most 64 tokens."""
    ids = torch.tensor([prompt.ids], device=model.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_endings(model, tokenizer),
    )
    generate: Any = model.generate
    with set_aside(model):
        output = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _endings(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Some families end a turn with one token and a text with another; the base lists both.
    known: Any = getattr(model.generation_config, "eos_token_id", None) or []
    return sorted({int(tokenizer.eos_token_id or 0), *([known] if isinstance(known, int) else known)})
