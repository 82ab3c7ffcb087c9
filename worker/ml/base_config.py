"""The values of a base model's configuration that could lead elsewhere: to code, to other files, to absurd sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from worker.ml.base_files import bad

# Language models that transformers has classes of its own for, whose linear layers bitsandbytes can quantise.
# The library chooses the class by `model_type`, not by the architecture: both must be known, and belong together.
MODEL_TYPES = {
    "ArceeForCausalLM": "arcee",
    "BloomForCausalLM": "bloom",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "FalconForCausalLM": "falcon",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm4",
    "GPT2LMHeadModel": "gpt2",
    "GPTBigCodeForCausalLM": "gpt_bigcode",
    "GPTJForCausalLM": "gptj",
    "GPTNeoForCausalLM": "gpt_neo",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GraniteForCausalLM": "granite",
    "HeliumForCausalLM": "helium",
    "LlamaForCausalLM": "llama",
    "MinistralForCausalLM": "ministral",
    "MistralForCausalLM": "mistral",
    "NemotronForCausalLM": "nemotron",
    "OlmoForCausalLM": "olmo",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "OPTForCausalLM": "opt",
    "PhiForCausalLM": "phi",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
    # Vision-language models, of which the text is trained.
    "Gemma3ForConditionalGeneration": "gemma3",
    "LlavaForConditionalGeneration": "llava",
    "Mistral3ForConditionalGeneration": "mistral3",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
}
# The library chooses the classes of their parts by type too.
_PARTS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "gemma3": {"text_config": ("gemma3_text",), "vision_config": ("siglip_vision_model",)},
    "llava": {
        "text_config": ("llama", "mistral", "qwen2"),
        "vision_config": ("clip_vision_model", "siglip_vision_model"),
    },
    "mistral3": {"text_config": ("mistral",), "vision_config": ("pixtral",)},
    # These two have one class each for their parts, and files from before the parts had types.
    "qwen2_vl": {"text_config": (None, "qwen2_vl_text"), "vision_config": (None, "qwen2_vl", "qwen2_vl_vision")},
    "qwen2_5_vl": {
        "text_config": (None, "qwen2_5_vl_text"),
        "vision_config": (None, "qwen2_5_vl", "qwen2_5_vl_vision"),
    },
}
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3")
_DTYPES = ("float16", "bfloat16", "float32")
_ROPE = (None, "default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "proportional", "mrope", "axial")
ACTIVATIONS = frozenset(
    {
        "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
        "gelu_pytorch_tanh", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
        "swish", "tanh",
    }
)  # fmt: skip
_SIZES = {
    **dict.fromkeys(CONTEXT_KEYS, 2**30),
    **dict.fromkeys(("vocab_size",), 2**22),
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 2**17),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 2**20),
    **dict.fromkeys(LAYER_KEYS, 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "head_dim"), 2**14),
}
_QUANTIZATION = {
    "quant_method": (None, "bitsandbytes", "BITS_AND_BYTES"),
    "load_in_4bit": (True,),
    "_load_in_4bit": (None, True),
    "load_in_8bit": (None, False),
    "_load_in_8bit": (None, False),
    "bnb_4bit_compute_dtype": (None, *_DTYPES),
    "bnb_4bit_quant_storage": (None, "uint8", *_DTYPES),
    "bnb_4bit_quant_type": (None, "nf4", "fp4"),
    "bnb_4bit_use_double_quant": (None, True, False),
    "llm_int8_enable_fp32_cpu_offload": (None, True, False),
    "llm_int8_has_fp16_weight": (None, True, False),
}
# Of any value: the first is never used in 4 bit, the second names layers.
_QUANTIZATION_FREE = ("llm_int8_threshold", "llm_int8_skip_modules")
_TOKENIZER_PATHS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "vocab", "chat_template_file")


def check_config(config: dict[str, Any]) -> None:
    """Raise InvalidInput for the first value of `config.json` that is not one of a plain causal language model."""
    _check_architecture(config)
    refuse_code("config.json", config)
    for key, value in _all_items(config):
        if key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
            # A name with a slash would fetch a compiled kernel from the hub.
            _check_one_of(key, value, _ATTENTION)
        elif key in ("torch_dtype", "dtype"):
            _check_one_of(key, _plain(value), (None, "auto", *_DTYPES))
        elif key in ("rope_scaling", "rope_parameters"):
            for name, kind in _all_items(value):
                if name in ("rope_type", "type"):
                    _check_one_of(f"{key}.{name}", kind, _ROPE)
        elif key in ("transformers_weights", "gguf_file", "fusion_config", "kernel_config") and value is not None:
            raise bad(f"config.json sets {key}, which leads to other files or code", "remove the key")
        elif key in ("hidden_act", "hidden_activation", "activation_function", "activation"):
            _check_one_of(key, value, (None, *sorted(ACTIVATIONS)))
    for part in (config, *_parts(config)):
        _check_sizes(part)


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `config.json` that is the language model's: all of it, unless there is a vision tower."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    known = _PARTS.get(config["model_type"], {})
    for key in ("text_config", "vision_config", "audio_config"):
        part = config.get(key)
        if part is None:
            continue
        if not isinstance(part, dict) or key not in known:
            raise bad(f"config.json sets {key}, which a {config['model_type']!r} does not have", "remove the key")
        _check_one_of(f"{key}.model_type", part.get("model_type"), known[key])
        yield part


def _check_sizes(config: dict[str, Any]) -> None:
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise bad(f"config.json sets {key} to {_short(value)}; it must be a whole number from 1 to {most:,}")


def _check_architecture(config: dict[str, Any]) -> None:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if architecture not in MODEL_TYPES:
        hint = f"supported are {', '.join(sorted(MODEL_TYPES))}"
        raise bad(f"its architecture {_short(architecture)} is not supported", hint)
    wanted = MODEL_TYPES[architecture]
    if config.get("model_type") != wanted:
        kind = _short(config.get("model_type"))
        raise bad(f"config.json sets model_type to {kind}, but a {architecture} is of the type {wanted!r}")


def refuse_code(name: str, values: dict[str, Any]) -> None:
    """Raise InvalidInput if the file `name` asks for Python code of its own, at any depth."""
    if any(key == "auto_map" and value for key, value in _all_items(values)):
        raise bad(
            f"{name} asks for Python code of its own (auto_map), which is never run here",
            "use a version of the model that transformers supports natively",
        )


def check_tokenizer_config(values: dict[str, Any]) -> None:
    """Raise InvalidInput if `tokenizer_config.json` asks for code, or names files elsewhere."""
    refuse_code("tokenizer_config.json", values)
    for key in _TOKENIZER_PATHS:
        value = values.get(key)
        if isinstance(value, str) and ("/" in value or "\\" in value):
            # Older versions of transformers open it, and the adapter's tokenizer would carry it away.
            raise bad(f"tokenizer_config.json sets {key} to {_short(value)}, a file elsewhere", "remove the key")


def is_quantized(config: dict[str, Any]) -> bool:
    """Return whether the weights are a 4-bit checkpoint of bitsandbytes.

    Raises:
        InvalidInput: they are quantised in another way, or with a setting that is not known.
    """
    asked = config.get("quantization_config")
    if asked is None:
        return False
    method = asked.get("quant_method") if isinstance(asked, dict) else asked
    if not isinstance(asked, dict) or method not in _QUANTIZATION["quant_method"] or not asked.get("load_in_4bit"):
        raise bad(
            f"its weights are quantised by {_short(method)}",
            "use the 16-bit weights of the model, or a 4-bit bitsandbytes checkpoint",
        )
    for key, value in asked.items():
        known = _QUANTIZATION.get(key)
        if known is not None:
            _check_one_of(f"quantization_config.{key}", _plain(value), known)
        elif key not in _QUANTIZATION_FREE:
            raise bad(f"config.json sets quantization_config.{key[:80]}, which is not known", "remove the key")
    return True


def _check_one_of(key: str, value: Any, known: tuple[Any, ...]) -> None:
    if not any(value is item or (type(value) is type(item) and value == item) for item in known):
        listed = ", ".join(str(item) for item in known if item is not None)
        raise bad(f"config.json sets {key} to {_short(value)}", f"remove the key, or set one of {listed}")


def _plain(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def _all_items(values: Any) -> Iterator[tuple[str, Any]]:
    # Sub-models have configurations of their own inside.
    if isinstance(values, dict):
        for key, value in values.items():
            yield key, value
            yield from _all_items(value)
    elif isinstance(values, list):
        for value in values:
            yield from _all_items(value)
