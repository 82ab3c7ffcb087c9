"""What follows from a job's method: the parts of the request that it has, and the defaults that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from common.schemas.exports import Export, check_exports
from common.schemas.hyperparameters import ADAPTER_LEARNING_RATE
from common.schemas.lora import Lora, Quantization

Method = Literal["qlora", "lora", "full"]
# An adapter's rate, ten times as high, tears whole weights apart.
_FULL_LEARNING_RATE = 2e-5


def default_learning_rate(method: str) -> float:
    """Return the learning rate that a method has by itself."""
    return _FULL_LEARNING_RATE if method == "full" else ADAPTER_LEARNING_RATE


def fill_in(data: dict[str, Any]) -> dict[str, Any]:
    """Return a request with what its method adds, so that the frozen spec says what will be done."""
    filled, method = dict(data), data.get("method", "qlora")
    if method == "qlora" and data.get("quantization") is None:
        filled["quantization"] = {}
    if method in ("qlora", "lora") and data.get("lora") is None:
        filled["lora"] = {}
    if method == "full":
        asked = data.get("hyperparameters", {})
        if isinstance(asked, dict):
            filled["hyperparameters"] = {"learning_rate": _FULL_LEARNING_RATE, **asked}
        filled.setdefault("export", ["model"])
    return filled


def check_parts(method: Method, lora: Lora | None, quantization: Quantization | None, export: Sequence[Export]) -> None:
    """Raise ValueError, beginning with the field, if the parts of a request do not fit its method."""
    four_bit = quantization is not None and quantization.load_in_4bit
    if method == "qlora" and not four_bit:
        raise ValueError('quantization.load_in_4bit: method "qlora" needs true; use method "lora" for a 16-bit base')
    if method == "lora" and four_bit:
        raise ValueError('quantization.load_in_4bit: method "lora" keeps the base in 16 bit; use method "qlora"')
    if method == "full" and four_bit:
        raise ValueError('quantization.load_in_4bit: method "full" trains the weights themselves; use method "qlora"')
    if method == "full" and lora is not None:
        raise ValueError('lora: method "full" has no adapter; leave it out, or use method "lora"')
    check_exports(export, method)
    # PiSSA and OLoRA would quantise what they leave of the base anew: a base that nobody else has.
    if method == "qlora" and lora is not None and (lora.changes_base or lora.init_lora_weights == "orthogonal"):
        raise ValueError(
            f'lora.init_lora_weights: "{lora.init_lora_weights}" needs a 16-bit base; '
            'use method "lora", or init_lora_weights true'
        )
    if lora is not None and lora.use_dora and quantization is not None and quantization.device_map == "auto":
        raise ValueError('lora.use_dora: measures weights that quantization.device_map "auto" may have moved away')
