"""Attaches LoRA adapters to a base, and writes them as stock peft, vLLM and llama.cpp read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import InvalidInput
from common.schemas.lora import Lora
from worker.ml.options import Choice
from worker.ml.targets import Modules, check_lora, check_rank, find_targets, find_to_save, held_in_4_bit
from worker.ml.towers import outside_text, pattern_of

WEIGHTS = "adapter_model.safetensors"
_PARAM = "lora.target_modules"
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# peft 0.21 looks for an embedding that is tied by these names: GPT-2's `wte` would be parted from its head.
_PEFTS_ENDS = ("embed_tokens", "lm_head")
Factors = dict[str, torch.Tensor]


def attach(base: PreTrainedModel, lora: Lora, *, ends: bool = False) -> PeftModel:
    """Return `base` with LoRA adapters on the target modules; only what `lora` names is trainable.

    Args:
        ends: train embedding and head as a whole too, because they have new rows.

    Raises:
        InvalidInput: something that is named does not exist, or cannot be trained in the way asked for.
    """
    modules = modules_of(base)
    check_lora(lora, modules)
    _check_init(base, lora)
    check_rank(lora, modules, lambda name: min(base.get_submodule(name).weight.shape))  # type: ignore[arg-type]
    to_save = sorted(
        find_to_save(lora.modules_to_save or [], modules) | (_ends(base, lora, modules) if ends else set())
    )
    _check_to_save(base, to_save)
    tied = _is_tied(base, to_save)
    if tied and not any(name.rpartition(".")[2] in _PEFTS_ENDS for name in to_save):
        to_save = sorted({*to_save, *([modules.head] if modules.head else [])})
    # peft's annotation knows whole numbers only, and so do some readers of the file.
    alpha: Any = int(lora.lora_alpha) if lora.lora_alpha.is_integer() else lora.lora_alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        # In full: peft takes every name that ends with these letters, `norm` for `input_layernorm`.
        modules_to_save=to_save or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]
        ensure_weight_tying=tied,
        # The layers of a vision tower carry the same names.
        exclude_modules=pattern_of(outside_text(base)),
        # peft sets it by itself, and warns.
        fan_in_fan_out=_has_conv1d(base),
    )
    try:
        return get_peft_model(base, config)
    except (ValueError, TypeError) as error:  # e.g. a layer of a kind that has no LoRA form
        raise _bad(f"{_PARAM}: {error}", modules) from error


def missing_biases(model: PeftModel, lora: Lora) -> tuple[Choice, ...]:
    """Return what there is to say where biases shall be trained and the base has none, as most newer ones."""
    trained = (name for name, item in model.named_parameters() if item.requires_grad)
    if lora.bias == "none" or any(name.endswith(".bias") for name in trained):
        return ()
    message = f"lora.bias {lora.bias!r} trains nothing more: "
    message += "this base has no biases" if lora.bias == "all" else "the target modules have no biases"
    return (Choice("bias.missing", message, {"asked": lora.bias}, "warning"),)


def modules_of(base: PreTrainedModel) -> Modules:
    """Return the names of the modules of `base` that can be trained: a vision tower's are left out."""
    head = base.get_output_embeddings()
    closed = pattern_of(outside_text(base)) or r"(?!)"
    named = [(name, module) for name, module in base.named_modules() if name and not re.fullmatch(closed, name)]
    return Modules(
        names=[name for name, _ in named],
        linear=[name for name, module in named if _is_linear(module) and module is not head],
        embeddings=[name for name, module in named if isinstance(module, torch.nn.Embedding)],
        head=next((name for name, module in named if module is head), None),
    )


def _is_linear(module: torch.nn.Module) -> bool:
    # GPT-2's Conv1D is a linear layer by another name.
    return isinstance(module, torch.nn.Linear | Conv1D)


def _has_conv1d(base: PreTrainedModel) -> bool:
    return any(isinstance(module, Conv1D) for module in base.modules())


def _check_init(base: PreTrainedModel, lora: Lora) -> None:
    # peft 0.21 decomposes the transposed weight of a Conv1D into factors of the wrong shapes.
    if lora.init_lora_weights == "olora" and _has_conv1d(base):
        raise InvalidInput(
            'lora.init_lora_weights: "olora" cannot begin from the Conv1D layers of this base',
            param="lora.init_lora_weights",
            hint='use "pissa", or true',
        )


def _check_to_save(base: PreTrainedModel, names: list[str]) -> None:
    for name in names:
        parameters = list(base.get_submodule(name).parameters())
        if any(getattr(parameter, "quant_state", None) for parameter in parameters):
            raise held_in_4_bit(name)
        if not parameters:
            raise InvalidInput(
                f"lora.modules_to_save: {name!r} has no weights to train",
                code="bad_modules_to_save",
                param="lora.modules_to_save",
                hint="leave it out",
            )


def _ends(base: PreTrainedModel, lora: Lora, modules: Modules) -> set[str]:
    wanted = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {name for name, module in base.named_modules() if any(module is end for end in wanted)}
    if names & find_targets(lora.target_modules, modules):
        raise InvalidInput(
            f"{_PARAM}: the vocabulary grows, so that the embedding is trained as a whole and carries no adapter",
            code="bad_target_modules",
            param=_PARAM,
            hint="leave the embedding out",
        )
    return names


def _is_tied(base: PreTrainedModel, to_save: list[str]) -> bool:
    """Return whether a module of `to_save` shares its weight: peft then keeps one trained copy for both."""
    tied = (base.get_input_embeddings(), base.get_output_embeddings())
    if None in tied or tied[0].weight is not tied[1].weight:
        return False
    return any(base.get_submodule(name) in tied for name in to_save)


def _bad(message: str, modules: Modules) -> InvalidInput:
    return InvalidInput(message, code="bad_target_modules", param=_PARAM, hint=modules.hint("linear layers"))


def set_adapter_dtype(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast the LoRA matrices to `dtype`, and what else is trained to fp32: its steps are too small for 16 bit.

    In place, so that an optimizer may already hold the parameters. The biases of 4-bit layers stay as they are:
    bitsandbytes 0.50 casts them to the compute dtype in each pass, in place.
    """
    quantized = {id(module.bias) for module in model.modules() if isinstance(module, Linear4bit)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in quantized:
            wanted = dtype if any(f".{factor}." in name for factor in _FACTORS) else torch.float32
            parameter.data = parameter.data.to(wanted)


def widen_norms(model: PeftModel) -> None:
    """Hold every LayerNorm of `model` in fp32 if more than LoRA matrices is trained: on a CPU, whose autocast leaves
    them as they are, torch refuses one whose input or bias is wider than its weight.

    On a card autocast computes them in fp32 itself.
    """
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if all(any(f".{factor}." in name for factor in _FACTORS) for name in trained):
        return
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            for parameter in module.parameters():
                parameter.data = parameter.data.float()


@contextmanager
def hidden(model: torch.nn.Module) -> Iterator[None]:
    """Make trained weights look frozen in the block: TRL 1.16 casts what it sees of a QLoRA to bf16, for good."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def factors(model: PeftModel) -> Factors:
    """Return copies of the LoRA matrices on the CPU, under the names that they have in an adapter's file."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if _factor(name)}


def _factor(name: str) -> str | None:
    return next((part for part in name.split(".") if part in _FACTORS), None)


def save_adapter(model: PeftModel, folder: Path, initial: Factors | None) -> None:
    """Write the adapter into `folder`, as one for the unaltered base.

    Args:
        initial: the factors before training, where they were taken out of the base (PiSSA, OLoRA). Nobody else's base
            lacks them, so the adapter becomes `B A - B0 A0`, of twice the rank.
    """
    # The vocabulary never grows here, so no embedding is saved; left to itself peft asks the hub whether it did.
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    if initial is None:
        return
    weights = load_file(folder / WEIGHTS)
    for name, first in initial.items():
        is_a = (_factor(name) or "").endswith("A")
        weights[name] = torch.cat([weights[name], first if is_a else -first], dim=0 if is_a else 1).contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # The scaling is alpha / r, or alpha / sqrt(r), and has to stay what it was.
    grown = config["lora_alpha"] * (2**0.5 if config["use_rslora"] else 2)
    path.write_text(json.dumps(config | {"r": 2 * config["r"], "lora_alpha": grown, "init_lora_weights": True}))


def trainable_count(model: torch.nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
