"""Gradients of an adapter by eager layers, row by row: what the fused path has to agree with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.schemas.lora import Lora
from worker.ml.adapters import attach
from worker.ml.base import keep_training_layout
from worker.ml.kernels.fused import Fused
from worker.ml.kernels.layer import Recompute
from worker.ml.kernels.rows import FlatRows

Gradients = dict[str, torch.Tensor]


def adapted(base: Path, lora: Lora, *, four_bit: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return the base of a folder with an adapter whose two matrices are both random."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    options = {"quantization_config": config} if four_bit else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": device}, **options)
    model.requires_grad_(False)
    keep_training_layout(model)
    made = attach(model, lora)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) * 0.3 * parameter.shape[-1] ** -0.5
            parameter.data = values.to(device, dtype)
    return made.train()


def rows(lengths: list[int], vocabulary: int) -> list[dict[str, list[int]]]:
    """Return rows whose first third is not trained."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in lengths:
        tokens = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        made.append({"input_ids": tokens, "labels": [-100] * (length // 3) + tokens[length // 3 :]})
    return made


def eager(model: PeftModel, data: list[dict[str, list[int]]]) -> tuple[float, Gradients]:
    """Return the mean loss per trained token, and its gradients, of one row after the other."""
    model.zero_grad()
    device = next(model.parameters()).device
    total, count = torch.zeros((), device=device), 0
    for row in data:
        tokens, labels = (torch.tensor(row[name], device=device) for name in ("input_ids", "labels"))
        logits = model(input_ids=tokens[None]).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    return float(total.detach()) / count, gradients(model)


def fused(
    path: Fused, model: PeftModel, data: list[dict[str, list[int]]], alter: Any = None
) -> tuple[float, Gradients]:
    """Return the same by the fused path; `alter` may break a micro-batch."""
    model.zero_grad()
    device = next(model.parameters()).device
    batch = {name: part.to(device) if hasattr(part, "to") else part for name, part in FlatRows()(data).items()}
    count, total = len(batch["targets"]), 0.0
    for micro, ways in path.micro_batches(batch):
        found = path.loss(alter(micro) if alter else micro, ways, 11)
        (found.loss / count).backward()
        total += float(found.loss.detach())
    return total / count, gradients(model)


def path_of(model: PeftModel, least: Recompute = Recompute.NOTHING, room: int | None = None) -> Fused:
    """Return the fused path of a model of any depth."""
    return Fused(model, least=(least,) * model.config.num_hidden_layers, room=room)


def gradients(model: PeftModel) -> Gradients:
    """Return copies of the gradients in fp32."""
    return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def reference(model: PeftModel, lora: Lora) -> PeftModel:
    """Return the same model and adapter in fp32, on the weights that 4 bit left."""
    base: Any = model.get_base_model()
    device = next(model.parameters()).device
    state = {}
    for name, module in base.named_modules():
        source = getattr(module, "base_layer", module)
        if isinstance(source, Linear4bit):
            weight = dequantize_4bit(source.weight.data, source.weight.quant_state)
            state[f"{name}.weight".replace(".base_layer", "")] = weight.float()
    for name, parameter in base.named_parameters():
        if "lora_" not in name and getattr(parameter, "quant_state", None) is None:
            state[name.replace(".base_layer", "")] = parameter.data.float()
    config = type(base.config).from_dict(base.config.to_dict() | {"quantization_config": None})
    with torch.device(device):
        plain = type(base)(config).float()
    missing, unknown = plain.load_state_dict(state, strict=False)
    # A tied head has no weights of its own.
    assert not unknown and (not missing or (config.tie_word_embeddings and missing == ["lm_head.weight"]))
    plain.requires_grad_(False)
    made = attach(plain, lora)
    named = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.data = named[name].data.float()
    return made.to(device).train()


def worst_error(ours: Gradients, theirs: Gradients) -> float:
    """Return the largest relative error of any matrix."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def worst_cosine(ours: Gradients, theirs: Gradients) -> float:
    """Return the smallest cosine of any matrix."""
    assert ours.keys() == theirs.keys()
    cosine = torch.nn.functional.cosine_similarity
    return min(float(cosine(ours[name].flatten(), theirs[name].flatten(), dim=0)) for name in theirs)
