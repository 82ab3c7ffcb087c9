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

_LAYERS = tuple(
    f"{family}DecoderLayer"
    for family in ("Granite", "Llama", "Ministral", "Mistral", "Phi3", "Qwen2", "Qwen3", "SmolLM3")
)
# Dropout that is not an adapter's.
_DROPOUT = {"attention_dropout": "attention weights", "resid_pdrop": "what its layers add"}


class NotCovered(Exception):
    """The model is trained by the plain path; the message says why."""


def require_covered(model: torch.nn.Module, dtype: torch.dtype, longest: int) -> None:
    """Raise NotCovered unless every layer of `model`, computing in `dtype`, and its head can be fused.

    Args:
        longest: tokens of the longest row.
    """
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
    _check_config(base.config, longest)
    for layer in layers:
        _check_layer(layer, dtype)
    _check_ends(base, dtype)


def decoder_layers(base: PreTrainedModel) -> list[Any]:
    """Return the layers of the decoder, in order."""
    return list(getattr(base.base_model, "layers", []))


def parts_of(layer: Any, *, eps: float) -> Parts:
    """Return a covered layer's modules, those with one input joined."""
    attention = layer.self_attn
    qkv, out, gate_up, down = map(Group, _linears(layer))
    return Parts(
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        first_norm=layer.input_layernorm.weight,
        second_norm=layer.post_attention_layernorm.weight,
        eps=eps,
        heads=attention.config.num_attention_heads,
        kv_heads=attention.config.num_key_value_heads,
        head_size=attention.head_dim,
        scale=attention.scaling,
        head_norm=_head_norm(attention),
        turns=bool(getattr(attention, "use_rope", True)),
        branch=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _linears(layer: Any) -> list[list[torch.nn.Module]]:
    """Return the linear layers, those with one input together. Phi-3's are joined in the checkpoint already."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        return [[attention.qkv_proj], [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj]]
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def _head_norm(attention: Any) -> torch.Tensor | None:
    """Return the frozen weights that each head of query and key is scaled by, None where heads have no norm."""
    if not hasattr(attention, "q_norm"):
        return None
    counts = attention.config.num_attention_heads, attention.config.num_key_value_heads
    norms = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
    return torch.cat([norm.expand(count, -1) for norm, count in zip(norms, counts, strict=True)])


def _check_config(config: Any, longest: int) -> None:
    if config.hidden_act != "silu":
        raise NotCovered(f"its activation is {config.hidden_act}")
    for name, what in _DROPOUT.items():
        if getattr(config, name, 0.0):
            raise NotCovered(f"it drops {what}")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # A token sees itself and the window's length less one before it: all of a row that is no longer.
    if window and longest > window:
        raise NotCovered(f"its attention sees {window} tokens, and the longest row has {longest}")
    rope = getattr(config, "rope_parameters", None) or {}
    most = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else longest
    if longest > most:
        # The library turns all rows of a batch by other angles then, short ones too.
        raise NotCovered(f"a row of more than {most} tokens changes those beside it, and the longest has {longest}")


def _check_layer(layer: Any, dtype: torch.dtype) -> None:
    known = set()
    for group in _linears(layer):
        for module in group:
            _check_linear(module, dtype)
        adapters = [item for item in map(adapter_of, group) if item is not None]
        if len({(item.a.shape[0], item.dropout) for item in adapters}) > 1:
            raise NotCovered("adapters beside each other differ in rank or dropout")
        known |= {id(factor) for item in adapters for factor in (item.a, item.b)}
    if any(parameter.requires_grad and id(parameter) not in known for parameter in layer.parameters()):
        raise NotCovered("more than LoRA matrices is trained in its layers")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(layer.self_attn, name) for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name)]
    for norm in norms:
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
