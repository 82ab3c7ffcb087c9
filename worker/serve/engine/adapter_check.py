"""What an adapter must be to lie over a base that others use too: LoRA that leaves the base itself alone."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from safetensors import safe_open

from common.errors import InvalidInput

_WEIGHTS = "adapter_model.safetensors"
MERGED = "ask for a merged model instead, and serve that"


def adapter_check(folder: Path, ends: list[str], *, weighted: bool = False) -> LoraConfig:
    """Return the configuration of the adapter in `folder`, for use and not for training.

    Args:
        ends: names of the base's embedding and head. Where they are tied, peft keeps one trained copy and stores both.
        weighted: it is to be scaled, or summed with others.

    Raises:
        InvalidInput: it changes the base itself, or cannot be weighted.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    saved = [*(config.modules_to_save or []), *(ends if config.ensure_weight_tying else [])]
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        # peft would write such tensors into the base, where every other adapter would meet them.
        stray = [key for key in list(file.keys()) if ".lora_" not in key and not _is_part(key, saved)]
    if stray or config.bias != "none":
        what = f"bias {config.bias!r}" if config.bias != "none" else ", ".join(stray[:3])
        raise _bad(f"the adapter changes the base itself ({what}), which others use too")
    if weighted and (config.use_dora or saved):
        what = "use_dora" if config.use_dora else "modules_to_save"
        raise _bad(f"an adapter with {what} is no sum of products, so it cannot be weighted", "use it by itself")
    return config


def _is_part(key: str, modules: list[str]) -> bool:
    return any(f".{module}." in f".{key}" for module in modules)


def _bad(message: str, hint: str = MERGED) -> InvalidInput:
    return InvalidInput(message, code="bad_adapter", param="model", hint=hint)
