"""What a folder must hold to be a base model here. Reads JSON and names of files only: no torch, no model code.

`trust_remote_code=False` and `weights_only` were both bypassed before (CVE-2026-4372, CVE-2025-32434), so a base is
refused by what its files say, before any library opens them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidInput

# Causal language models that transformers has classes of its own for, whose linear layers bitsandbytes can quantise.
ARCHITECTURES = frozenset(
    {
        "ArceeForCausalLM",
        "BloomForCausalLM",
        "CohereForCausalLM",
        "Cohere2ForCausalLM",
        "FalconForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GlmForCausalLM",
        "Glm4ForCausalLM",
        "GPT2LMHeadModel",
        "GPTBigCodeForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoForCausalLM",
        "GPTNeoXForCausalLM",
        "GraniteForCausalLM",
        "HeliumForCausalLM",
        "LlamaForCausalLM",
        "MinistralForCausalLM",
        "MistralForCausalLM",
        "NemotronForCausalLM",
        "OlmoForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OPTForCausalLM",
        "PhiForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
        "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
    }
)
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3")
_JSON_MAX_BYTES = 32 * 2**20


@dataclass(frozen=True)
class BaseFacts:
    """What `config.json` says. `context` is in tokens, None where the model has no fixed one."""

    architecture: str
    model_type: str
    context: int | None
    vocab_size: int | None
    num_layers: int | None
    quantized: bool


def base_check(folder: Path, *, weights: bool = True) -> BaseFacts:
    """Return the facts of the base model in `folder`.

    Args:
        weights: also require complete safetensors weights. A preflight may have no weights at all; pickles that lie
            there alone are refused in any case.

    Raises:
        InvalidInput: the folder is not a base model that can be trained; the message says what is wrong with it.
    """
    config = _config(folder)
    facts = _facts(config)
    _refuse_code(folder, config)
    _check_tokenizer(folder)
    _check_weights(folder, required=weights)
    return facts


def _bad(message: str, hint: str) -> InvalidInput:
    return InvalidInput(f"base model: {message}", code="bad_base_model", param="model", hint=hint)


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _JSON_MAX_BYTES:
        raise _bad(f"{path.name} is larger than {_JSON_MAX_BYTES:,} bytes", "use an unaltered copy of the model")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _bad(f"{path.name} is not JSON: {error}", "use an unaltered copy of the model") from error
    if not isinstance(values, dict):
        raise _bad(f"{path.name} is not a JSON object", "use an unaltered copy of the model")
    return values


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise _bad("it has no config.json", "name a model in the Hugging Face layout: config, tokenizer, safetensors")
    return _read_json(path)


def _facts(config: dict[str, Any]) -> BaseFacts:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if architecture not in ARCHITECTURES:
        raise _bad(
            f"its architecture {architecture!r} is not supported",
            f"supported are {', '.join(sorted(ARCHITECTURES))}",
        )
    context = next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    return BaseFacts(
        architecture=architecture,
        model_type=str(config.get("model_type")),
        context=context,
        vocab_size=_number(config, "vocab_size"),
        num_layers=_number(config, "num_hidden_layers") or _number(config, "n_layer"),
        quantized=_quantized(config),
    )


def _number(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) else None


def _quantized(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict) or not quantization.get("load_in_4bit"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise _bad(
            f"its weights are quantised by {method!r}",
            "use the 16-bit weights of the model, or a 4-bit bitsandbytes checkpoint",
        )
    return True


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    for name, values in (
        ("config.json", config),
        ("tokenizer_config.json", _optional(folder / "tokenizer_config.json")),
    ):
        if values.get("auto_map"):
            raise _bad(
                f"{name} asks for Python code of its own (auto_map), which is never run here",
                "use a version of the model that transformers supports natively",
            )
    for key in ("_attn_implementation", "attn_implementation"):
        # A name with a slash would fetch a compiled kernel from the hub.
        if config.get(key) not in _ATTENTION:
            raise _bad(f"config.json sets {key} to {config[key]!r}", "remove the key")


def _optional(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _check_tokenizer(folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise _bad("it has no tokenizer", "add tokenizer.json (or tokenizer.model) to the folder")


def _check_weights(folder: Path, *, required: bool) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        if required:
            _check_shards(folder, index)
    elif not (folder / "model.safetensors").is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise _bad(
                f"its weights are pickle files ({', '.join(pickles[:3])}), which can run code when they are opened",
                "convert them to safetensors, or name a revision that has model.safetensors",
            )
        if required:
            raise _bad("it has no model.safetensors", "add the weights as safetensors")


def _check_shards(folder: Path, index: Path) -> None:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise _bad(f"{index.name} lists no weights", "use an unaltered copy of the model")
    for name in sorted({str(value) for value in shards.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _bad(
                f"{index.name} names {name!r}, which is not a safetensors file beside it", "use an unaltered copy"
            )
        if not (folder / name).is_file():
            raise _bad(f"the weight file {name} is missing", "fetch the model again")
