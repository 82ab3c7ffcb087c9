"""Which inference engines take an adapter as it is, with the flags to start them, or why not.

Read from `adapter_config.json` alone, as the engines do. Their rules, as of November 2026:

- vLLM 0.27: `vllm/lora/peft_helper.py` (modules_to_save, DoRA, bias, rank), `vllm/config/lora.py` (the ranks that
  `--max-lora-rank` takes), the LoRA column of `docs/models/supported_models.md`, `vllm/lora/utils.py` (linear layers,
  and the `embedding_modules` of a model's class; `lora_model.py` refuses any other). It heeds rsLoRA.
- SGLang: `python/sglang/srt/lora/lora_manager.py` (added tokens, DoRA), `lora.py` (it scales by alpha / r whatever the
  file says; it passes over modules_to_save and biases without a word; it stacks q, k and v, gate and up), `utils.py`
  (the modules that it knows; no regular expressions), `srt/models/` (the architectures).
- llama.cpp: `convert_lora_to_gguf.py` (every tensor must be a LoRA factor; alpha is all it notes of the scaling, so
  rsLoRA needs a scale of its own), `conversion/__init__.py` (the architectures), `conversion/gpt2.py` (it transposes
  the weights of Conv1D, and the factors of a LoRA with them, which stand the right way already).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
# Of the architectures that can be trained here, those that the engines do not take a LoRA for, or do not know at all.
_NOT_IN_VLLM = frozenset(
    {
        "BloomForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoForCausalLM",
        "GPTNeoXForCausalLM", "HeliumForCausalLM", "MinistralForCausalLM", "StableLmForCausalLM",
    }
)  # fmt: skip
# Those whose class in vLLM declares `embedding_modules`, or inherits them; another takes a LoRA on linear layers only.
_VLLM_EMBEDDINGS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM"})
_NOT_IN_LLAMA_CPP = frozenset(
    {"GPTJForCausalLM", "GPTNeoForCausalLM", "HeliumForCausalLM", "MinistralForCausalLM", "OPTForCausalLM"}
)
_NOT_IN_SGLANG = frozenset({"GPTNeoForCausalLM", "HeliumForCausalLM", "MinistralForCausalLM", "NemotronForCausalLM"})
_SGLANG_MODULES = frozenset(
    {
        "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
        "embed_tokens", "lm_head",
    }
)  # fmt: skip
# SGLang stacks these: the second and third cannot be there without the first and, of attention, the values.
_SGLANG_STACKS = (({"q_proj", "k_proj", "v_proj"}, {"q_proj", "v_proj"}), ({"gate_proj", "up_proj"}, {"gate_proj"}))


@dataclass(frozen=True)
class Adapter:
    """What the engines ask of an adapter. `targets` are the last parts of module names, or a regular expression."""

    base_id: str
    architecture: str
    r: int
    targets: tuple[str, ...] | str
    modules_to_save: tuple[str, ...]
    bias: str
    use_dora: bool
    use_rslora: bool
    vocabulary_grown: bool
    tied: bool

    @property
    def leaves(self) -> frozenset[str]:
        """The last parts of the names of the target modules; empty for a regular expression."""
        return frozenset() if isinstance(self.targets, str) else frozenset(name.split(".")[-1] for name in self.targets)

    @property
    def embeds(self) -> bool:
        """Whether the input embedding carries a part of it."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, "model.embed_tokens") is not None
        return "embed_tokens" in self.leaves


def read_adapter(config: dict[str, Any], architecture: str, *, vocabulary_grown: bool, tied: bool) -> Adapter:
    """Return the facts in an `adapter_config.json` beside those of its base; `tied`: its head shares the embeddings."""
    targets = config["target_modules"]
    return Adapter(
        base_id=config["base_model_name_or_path"],
        architecture=architecture,
        r=max([config["r"], *(config.get("rank_pattern") or {}).values()]),
        targets=targets if isinstance(targets, str) else tuple(targets),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        bias=config.get("bias", "none"),
        use_dora=bool(config.get("use_dora")),
        use_rslora=bool(config.get("use_rslora")),
        vocabulary_grown=vocabulary_grown,
        tied=tied,
    )


def servable(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Return for each engine `servable`, with `commands` where it is true and `reasons` where it is not."""
    report: dict[str, dict[str, Any]] = {}
    for engine, (refusals, commands) in _ENGINES.items():
        reasons = refusals(adapter)
        report[engine] = {"servable": not reasons} | (
            {"reasons": reasons} if reasons else {"commands": commands(adapter)}
        )
    return report


def _of_all(adapter: Adapter, engine: str) -> list[str]:
    """Return what no engine takes."""
    found = {
        f"{engine} has no DoRA (use_dora)": adapter.use_dora,
        f"{engine} loads no whole modules with an adapter (modules_to_save: "
        f"{', '.join(adapter.modules_to_save)})": bool(adapter.modules_to_save),
        f"{engine} loads no biases with an adapter (bias: {adapter.bias})": adapter.bias != "none",
        f"{engine} adds no tokens to the vocabulary of its base, and this adapter does": adapter.vocabulary_grown,
    }
    return [reason for reason, holds in found.items() if holds]


def _vllm_refusals(adapter: Adapter) -> list[str]:
    reasons = _of_all(adapter, "vLLM")
    if adapter.architecture in _NOT_IN_VLLM:
        reasons.append(f"vLLM takes no LoRA for {adapter.architecture}")
    if adapter.embeds and adapter.architecture not in _VLLM_EMBEDDINGS:
        reasons.append(f"vLLM is not known to take a LoRA on the embedding of {adapter.architecture} (embed_tokens)")
    if adapter.r > _VLLM_RANKS[-1]:
        reasons.append(f"vLLM takes ranks up to {_VLLM_RANKS[-1]}, and this one is {adapter.r}")
    return reasons


def _vllm_commands(adapter: Adapter) -> list[str]:
    rank = next(rank for rank in _VLLM_RANKS if rank >= adapter.r)
    wider = f" --max-lora-rank {rank}" if rank > _VLLM_DEFAULT_RANK else ""
    return [f"vllm serve {adapter.base_id} --enable-lora{wider} --lora-modules NAME=adapter"]


def _sglang_refusals(adapter: Adapter) -> list[str]:
    reasons = _of_all(adapter, "SGLang")
    if adapter.architecture in _NOT_IN_SGLANG:
        reasons.append(f"SGLang has no {adapter.architecture} of its own, and its fallback is not known to take a LoRA")
    if adapter.use_rslora:
        reasons.append("SGLang scales every adapter by alpha / r, and this one needs alpha / sqrt(r) (use_rslora)")
    if isinstance(adapter.targets, str):
        reasons.append("SGLang reads no regular expression in target_modules; name the modules in a list")
    if unknown := sorted(adapter.leaves - _SGLANG_MODULES):
        reasons.append(f"SGLang knows no LoRA for the modules {', '.join(unknown)}")
    for stacked, needed in _SGLANG_STACKS:
        if adapter.leaves & stacked and (missing := sorted(needed - adapter.leaves)):
            names = ", ".join(sorted(adapter.leaves & stacked))
            reasons.append(f"SGLang stacks {names} with {', '.join(missing)}, which the adapter does not target")
    return reasons


def _sglang_commands(adapter: Adapter) -> list[str]:
    return [
        f"python -m sglang.launch_server --model-path {adapter.base_id} --enable-lora --max-lora-rank {adapter.r} "
        "--lora-paths NAME=adapter"
    ]


def _llama_cpp_refusals(adapter: Adapter) -> list[str]:
    reasons = _of_all(adapter, "llama.cpp")
    if adapter.architecture in _NOT_IN_LLAMA_CPP:
        reasons.append(f"llama.cpp does not convert {adapter.architecture}")
    if adapter.architecture == "GPT2LMHeadModel":
        reasons.append("llama.cpp turns the factors of GPT2LMHeadModel round with its Conv1D weights")
    if adapter.tied and "lm_head" in adapter.leaves:
        reasons.append("llama.cpp has no head of its own for a base that shares it with the embeddings (lm_head)")
    return reasons


def _llama_cpp_commands(adapter: Adapter) -> list[str]:
    # It multiplies by alpha / r.
    use = f"--lora-scaled adapter.gguf:{adapter.r**0.5:.6g}" if adapter.use_rslora else "--lora adapter.gguf"
    return [
        "python convert_lora_to_gguf.py --base BASE_FOLDER --outfile adapter.gguf adapter",
        f"llama-server --model BASE.gguf {use}",
    ]


_Rules = tuple[Callable[[Adapter], list[str]], Callable[[Adapter], list[str]]]
_ENGINES: dict[str, _Rules] = {
    "vllm": (_vllm_refusals, _vllm_commands),
    "sglang": (_sglang_refusals, _sglang_commands),
    "llama.cpp": (_llama_cpp_refusals, _llama_cpp_commands),
}
