"""Attaches LoRA adapters to a base, and refuses targets that match nothing instead of training less than was asked."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from common.errors import InvalidInput
from common.schemas.lora import Lora

_PARAM = "lora.target_modules"


def attach(base: PreTrainedModel, lora: Lora) -> PeftModel:
    """Return `base` with LoRA adapters on the target modules; only they (and the biases asked for) are trainable.

    Raises:
        InvalidInput: a target matches no linear layer, or matches the output head.
    """
    check_targets(base, lora.target_modules)
    # peft's annotation knows whole numbers only, and so do some readers of the file.
    alpha: Any = int(lora.lora_alpha) if lora.lora_alpha.is_integer() else lora.lora_alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:  # e.g. a layer of a kind that has no LoRA form
        raise _bad(f"{_PARAM}: {error}", linear_names(base)) from error


def linear_names(base: PreTrainedModel) -> Counter[str]:
    """Return the last parts of the names of all linear layers but the output head, with how often each occurs."""
    head = base.get_output_embeddings()
    return Counter(
        name.rpartition(".")[2] for name, module in base.named_modules() if _is_linear(module) and module is not head
    )


def _is_linear(module: torch.nn.Module) -> bool:
    # GPT-2's Conv1D is a linear layer by another name.
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def check_targets(base: PreTrainedModel, targets: list[str] | str) -> None:
    """Raise InvalidInput unless every target names layers of `base` that can be trained."""
    if targets == "all-linear":
        return
    names = [name for name, _ in base.named_modules() if name]
    matched = (
        {target: _matches(target, names, regular=False) for target in targets}
        if isinstance(targets, list)
        else {targets: _matches(targets, names, regular=True)}
    )
    missing = [target for target, found in matched.items() if not found]
    if missing:
        what = "no module" if len(missing) == len(matched) else "nothing for these"
        raise _bad(f"{_PARAM}: the base model has {what}: {', '.join(map(repr, missing))}", linear_names(base))
    head = next((name for name, module in base.named_modules() if module is base.get_output_embeddings()), None)
    if any(head in found for found in matched.values()):
        raise _bad(f"{_PARAM}: the output head {head!r} cannot carry an adapter", linear_names(base))


def _matches(target: str, names: list[str], *, regular: bool) -> list[str]:
    if not regular:
        return [name for name in names if name == target or name.endswith("." + target)]
    try:
        return [name for name in names if re.fullmatch(target, name)]
    except re.error as error:
        raise InvalidInput(
            f"{_PARAM}: {target!r} is not a regular expression: {error}",
            param=_PARAM,
            hint='use a list of names, a regular expression, or "all-linear"',
        ) from error


def _bad(message: str, existing: Counter[str]) -> InvalidInput:
    listed = ", ".join(f"{name} ({count} times)" for name, count in existing.most_common(24))
    return InvalidInput(message, code="bad_target_modules", param=_PARAM, hint=f"linear layers of this base: {listed}")


def set_adapter_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast the trained weights to `dtype` in place, so that an optimizer may already hold the parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def trainable_count(model: torch.nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
