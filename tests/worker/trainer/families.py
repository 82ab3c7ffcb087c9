"""Tiny bases of every family that the fast path covers, each with what sets it apart from Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.schemas.lora import Lora
from tests.worker.trainer import eager, tiny

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW = 12
_PHI_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
# Heads that are wider together than the hidden state, as those of small and large Qwen 3 are.
COVERED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": WINDOW}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, with biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3, heads that turn in part": ("phi3", {"rope_parameters": _PHI_ROPE, "hidden_size": 128}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "granite": (
        "granite",
        {"residual_multiplier": 0.22, "logits_scaling": 8.0, "attention_multiplier": 0.1, "embedding_multiplier": 12.0},
    ),
}
NEW = [name for name in COVERED if name != "llama"]


def build(folder: Path, name: str, **config: Any) -> Path:
    """Write the tiny base of a family."""
    model_type, own = COVERED[name]
    return tiny.build_family(folder / "base", model_type, **(_SIZES | own | config))


def adapted(
    folder: Path,
    name: str,
    lora: Lora,
    *,
    four_bit: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **config: Any,
) -> Any:
    """Return a family's model with an adapter; norms, which begin as ones, and biases are random."""
    model = eager.adapted(build(folder, name, **config), lora, four_bit=four_bit, dtype=dtype, device=device)
    stir(model)
    return model


def stir(model: torch.nn.Module) -> None:
    """Draw norms and biases at random: a norm of ones hides where it is left out."""
    generator = torch.Generator().manual_seed(5)
    for where, parameter in model.named_parameters():
        if "norm" in where or where.endswith(".bias"):
            values = torch.randn(parameter.shape, generator=generator) * 0.2 + (1 if "norm" in where else 0)
            parameter.data.copy_(values.to(parameter))
