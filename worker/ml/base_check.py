"""What a folder must hold to be a base model here. Reads JSON and names of files only: no torch, no model code.

`trust_remote_code=False` and `weights_only` were both bypassed before (CVE-2026-4372, CVE-2025-32434), so a base is
refused by what its files say, before any library opens them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput
from common.memory.shape import Shape, read_shape
from worker.ml.base_config import (
    CONTEXT_KEYS,
    LAYER_KEYS,
    MODEL_TYPES,
    check_config,
    check_tokenizer_config,
    is_quantized,
    text_part,
)
from worker.ml.base_files import bad, check_files, check_weights, read_json

ARCHITECTURES = frozenset(MODEL_TYPES)
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class BaseFacts:
    """What `config.json` says. `context` is in tokens, None where the model has no fixed one.

    `shape`: the sizes that its memory follows from, None where one is missing.
    """

    architecture: str
    model_type: str
    context: int | None
    vocab_size: int | None
    num_layers: int | None
    quantized: bool
    shape: Shape | None


def base_check(folder: Path, *, weights: bool = True) -> BaseFacts:
    """Return the facts of the base model in `folder`.

    Args:
        weights: also require complete safetensors weights. A preflight may have no weights at all; what lies there is
            looked at in any case.

    Raises:
        InvalidInput: the folder is not a base model that can be trained; the message says what is wrong with it.
    """
    if not (folder / "config.json").is_file():
        raise bad("it has no config.json", "name a model in the Hugging Face layout: config, tokenizer, safetensors")
    check_files(folder)
    config = read_json(folder / "config.json")
    check_config(config)
    facts = _facts(config)
    _check_tokenizer(folder)
    check_weights(folder, required=weights)
    return facts


def check_forms(exports: Sequence[str], facts: BaseFacts) -> None:
    """Raise InvalidInput unless the base has what the merged models in `exports` are made of."""
    if facts.quantized and "merged" in exports:
        raise InvalidInput(
            'export: "merged" needs the 16-bit weights of the base, but this one is stored in 4 bit',
            code="bad_export",
            param="export",
            hint='use "merged_dequantized" or "merged_4bit", or the 16-bit version of the model',
        )


def _facts(config: dict[str, Any]) -> BaseFacts:
    text = text_part(config)
    return BaseFacts(
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        context=next((text[key] for key in CONTEXT_KEYS if text.get(key)), None),
        vocab_size=text.get("vocab_size"),
        num_layers=next((text[key] for key in LAYER_KEYS if text.get(key)), None),
        quantized=is_quantized(config),
        shape=read_shape(config),
    )


def _check_tokenizer(folder: Path) -> None:
    if (folder / "tokenizer_config.json").is_file():
        check_tokenizer_config(read_json(folder / "tokenizer_config.json"))
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise bad("it has no tokenizer", "add tokenizer.json (or tokenizer.model) to the folder")
