"""The names of every supported architecture's modules, known without a model: from a table beside this file.

The preflight has no torch, which takes seconds to import, and a wrong name should not cost a GPU. The table is made by
`python -m worker.ml.module_names` from the library's own classes; a test compares the two. `*` stands for the number of
a layer.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from worker.ml.base_config import MODEL_TYPES
from worker.ml.targets import Modules

_TABLE = Path(__file__).with_suffix(".json")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Options of a configuration that add modules. What is there in any case is allowed; the worker looks at the model.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"qk_layernorm": True},
    {"use_qk_norm": True},
    {"new_decoder_architecture": True},
    {"parallel_attn": False},
    {"word_embed_proj_dim": 512},
)


def known_modules(architecture: str, num_layers: int) -> Modules:
    """Return the modules of a base of `architecture` with so many layers."""
    entry = _table()[architecture]

    def expand(names: list[str]) -> list[str]:
        return [name.replace("*", str(layer)) for name in names for layer in range(num_layers if "*" in name else 1)]

    linear, embeddings = expand(entry["linear"]), expand(entry["embeddings"])
    head = entry["head"]
    names = [*linear, *embeddings, *expand(entry["other"]), *([head] if head else [])]
    return Modules(names, linear, embeddings, head)


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(_TABLE.read_text())
    return table


def measure(architecture: str) -> dict[str, Any]:
    """Return the table's entry for `architecture`, from models without memory."""
    linear: set[str] = set()
    embeddings: set[str] = set()
    other: set[str] = set()
    for variant in _VARIANTS:
        modules = _built(architecture, variant)
        if modules is None:
            continue
        linear |= {_NUMBER.sub("*", name) for name in modules.linear}
        embeddings |= {_NUMBER.sub("*", name) for name in modules.embeddings}
        other |= {_NUMBER.sub("*", name) for name in modules.names if name != modules.head}
        head = modules.head
    return {
        "head": head,
        "linear": sorted(linear),
        "embeddings": sorted(embeddings),
        "other": sorted(other - linear - embeddings),
    }


def _built(architecture: str, variant: dict[str, Any]) -> Modules | None:
    from transformers import AutoConfig

    from worker.ml.adapters import modules_of
    from worker.ml.towers import empty_model

    config = AutoConfig.for_model(MODEL_TYPES[architecture])
    if not all(hasattr(config, name) for name in variant):
        return None
    for name, value in variant.items():
        setattr(config, name, value)
    # transformers 5.23: the defaults of Ministral and Nemotron are not enough for their own classes.
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    return modules_of(empty_model(config))


if __name__ == "__main__":
    _TABLE.write_text(json.dumps({name: measure(name) for name in sorted(MODEL_TYPES)}, indent=1) + "\n")
