"""Vision-language bases, of which the text is trained: the vision tower stays as it is, in 16 bit and frozen.

Rows are texts, so that no image ever reaches the tower; what is published fits the whole model.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)


def has_tower(config: PreTrainedConfig) -> bool:
    """Return whether `config` is that of a vision-language model."""
    return getattr(config, "vision_config", None) is not None


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return the class whose `from_pretrained` and `from_config` make the whole model of `config`."""
    return AutoModelForImageTextToText if has_tower(config) else AutoModelForCausalLM


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the library's own class for `config`; raises KeyError where it has none."""
    mapping: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if has_tower(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    found: type[PreTrainedModel] = mapping[type(config)]
    return found


def outside_text(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules beside the language model and its head: vision tower and projector, if any."""
    if not has_tower(model.config):
        return []
    ends = (model.get_decoder(), model.get_output_embeddings())
    kept = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    outside: list[str] = []
    for name, _ in model.named_modules():
        related = any(_is_within(name, other) or _is_within(other, name) for other in kept)
        if not related and not any(_is_within(name, other) for other in outside):
            outside.append(name)
    return outside


def _is_within(name: str, whole: str) -> bool:
    return whole in ("", name) or name.startswith(f"{whole}.")


def pattern_of(outside: list[str]) -> str | None:
    """Return a regular expression for everything within the modules `outside`; None where there is nothing."""
    return "|".join(rf"{re.escape(name)}(\..*)?" for name in outside) or None


def freeze(model: PreTrainedModel, outside: list[str]) -> None:
    """Stop the training of the modules `outside`."""
    for name in outside:
        model.get_submodule(name).requires_grad_(False)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of `config` in 16 bit on the meta device: names, shapes and classes without memory."""
    with torch.device("meta"):
        made: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return made
