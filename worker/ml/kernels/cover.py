"""Which models the fused layers cover: those whose every layer has the shape, and the adapters, that they compute."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from worker.ml.kernels.layer import Parts
from worker.ml.kernels.linear import Group, adapter_of

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class NotCovered(Exception):
    """The model is trained by the plain path; the message says why."""


def require_covered(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raise NotCovered unless every layer of `model`, computing in `dtype`, and its head can be fused."""
    if dtype == torch.float16:
        raise NotCovered("fp16 needs a loss scaler")
    if not isinstance(model, PeftModel):
        raise NotCovered("no adapter is trained, but the base itself")
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    layers = decoder_layers(base)
    kinds = sorted({type(layer).__name__ for layer in layers} - set(_LAYERS))
    if kinds or not layers:
        raise NotCovered(f"its layers are {', '.join(kinds) or 'unknown'}")
    _check_config(base.config)
    for layer in layers:
        _check_layer(layer, dtype)
    _check_ends(base, dtype)


def decoder_layers(base: PreTrainedModel) -> list[Any]:
    """Return the layers of the decoder, in order."""
    return list(getattr(base.base_model, "layers", []))


def parts_of(layer: Any, *, eps: float) -> Parts:
    """Return a covered layer's modules, those with one input joined."""
    attention, mlp = layer.self_attn, layer.mlp
    return Parts(
        qkv=Group([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=Group([attention.o_proj]),
        gate_up=Group([mlp.gate_proj, mlp.up_proj]),
        down=Group([mlp.down_proj]),
        first_norm=layer.input_layernorm.weight,
        second_norm=layer.post_attention_layernorm.weight,
        eps=eps,
        heads=attention.config.num_attention_heads,
        kv_heads=attention.config.num_key_value_heads,
        head_size=attention.head_dim,
        scale=attention.scaling,
    )


def _check_config(config: Any) -> None:
    if config.hidden_act != "silu":
        raise NotCovered(f"its activation is {config.hidden_act}")
    if getattr(config, "attention_dropout", 0.0):
        raise NotCovered("it drops attention weights")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise NotCovered("its attention has a sliding window")


def _check_layer(layer: Any, dtype: torch.dtype) -> None:
    groups = [[getattr(layer.self_attn, name) for name in _ATTENTION[:3]], [layer.self_attn.o_proj],
              [getattr(layer.mlp, name) for name in _MLP[:2]], [layer.mlp.down_proj]]  # fmt: skip
    known = set()
    for group in groups:
        for module in group:
            _check_linear(module, dtype)
        adapters = [item for item in map(adapter_of, group) if item is not None]
        if len({(item.a.shape[0], item.dropout) for item in adapters}) > 1:
            raise NotCovered("adapters beside each other differ in rank or dropout")
        known |= {id(factor) for item in adapters for factor in (item.a, item.b)}
    if any(parameter.requires_grad and id(parameter) not in known for parameter in layer.parameters()):
        raise NotCovered("more than LoRA matrices is trained in its layers")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        if norm.weight.dtype != dtype:
            raise NotCovered(f"its norms are held in {norm.weight.dtype}, and computed in {dtype}")


def _check_linear(module: torch.nn.Module, dtype: torch.dtype) -> None:
    base = module
    if isinstance(module, LoraLayer):
        base = module.base_layer
        names = list(module.active_adapters)
        plain = len(names) == 1 and names[0] in module.lora_A and not getattr(module, "lora_variant", {})
        if not plain or module.use_dora.get(names[0]) or module.lora_bias.get(names[0]):
            raise NotCovered("its adapters are more than a pair of matrices")
    if type(base) not in (torch.nn.Linear, Linear4bit):
        raise NotCovered(f"it has a linear layer of the kind {type(base).__name__}")
    state = getattr(base.weight, "quant_state", None)
    held = base.weight.dtype if state is None else state.dtype
    if held != dtype:
        raise NotCovered(f"its weights are {held}, and computed in {dtype}")


def _check_ends(base: PreTrainedModel, dtype: torch.dtype) -> None:
    head: Any = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
        raise NotCovered("its head is trained, or is more than a matrix")
    embedding: Any = base.get_input_embeddings()
    if head.weight.dtype != dtype or embedding.weight.dtype != dtype:
        raise NotCovered(f"its embedding or head is not held in {dtype}")
