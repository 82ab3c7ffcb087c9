"""Which engine takes which adapter: every rule of theirs refuses what it is about, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from worker.ml.base_check import ARCHITECTURES
from worker.ml.servable import _NOT_IN_LLAMA_CPP, _NOT_IN_SGLANG, _NOT_IN_VLLM, read_adapter, servable

CONFIG: dict[str, Any] = {
    "base_model_name_or_path": "org/base", "r": 16, "lora_alpha": 32, "bias": "none", "modules_to_save": None,
    "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"], "use_dora": False, "use_rslora": False,
    "rank_pattern": {},
}  # fmt: skip
ENGINES = ("vllm", "sglang", "llama.cpp")


def report(
    changes: dict[str, Any] | None = None,
    architecture: str = "LlamaForCausalLM",
    *,
    vocabulary_grown: bool = False,
    tied: bool = False,
) -> dict[str, dict[str, Any]]:
    config = CONFIG | (changes or {})
    return servable(read_adapter(config, architecture, vocabulary_grown=vocabulary_grown, tied=tied))


def takers(*arguments: Any, **options: Any) -> list[str]:
    return [engine for engine, told in report(*arguments, **options).items() if told["servable"]]


def test_a_plain_adapter_is_served_by_all_with_their_flags():
    told = report()
    assert takers() == list(ENGINES)
    assert told["vllm"]["commands"] == ["vllm serve org/base --enable-lora --lora-modules NAME=adapter"]
    (command,) = told["sglang"]["commands"]
    assert command.startswith("python -m sglang.launch_server --model-path org/base --enable-lora --max-lora-rank 16 ")
    convert, serve = told["llama.cpp"]["commands"]
    assert convert.startswith("python convert_lora_to_gguf.py --base ") and serve.endswith("--lora adapter.gguf")


@pytest.mark.parametrize(("r", "flag"), [(1, ""), (16, ""), (17, "32"), (64, "64"), (300, "320"), (512, "512")])
def test_the_rank_that_vllm_is_told(r: int, flag: str):
    (command,) = report({"r": r})["vllm"]["commands"]
    assert ("--max-lora-rank" in command) == bool(flag)
    assert not flag or f"--max-lora-rank {flag} " in command


def test_a_rank_that_vllm_has_no_flag_for():
    assert takers({"r": 513}) == ["sglang", "llama.cpp"]
    assert takers({"rank_pattern": {"q_proj": 600}}) == ["sglang", "llama.cpp"]


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "dora": ({"use_dora": True}, [], "use_dora"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, [], "lm_head"),
    "biases": ({"bias": "all"}, [], "bias: all"),
    "rslora": ({"use_rslora": True}, ["vllm", "llama.cpp"], "sqrt(r)"),
    "a pattern": ({"target_modules": ".*q_proj"}, ["vllm", "llama.cpp"], "regular expression"),
    "half of attention": ({"target_modules": ["q_proj", "k_proj"]}, ["vllm", "llama.cpp"], "v_proj"),
    "half of the gate": ({"target_modules": ["up_proj"]}, ["vllm", "llama.cpp"], "gate_proj"),
    "other modules": ({"target_modules": ["query_key_value"]}, ["vllm", "llama.cpp"], "query_key_value"),
}


@pytest.mark.parametrize(("changes", "expected", "word"), REFUSED.values(), ids=REFUSED)
def test_what_an_engine_does_not_take(changes: dict[str, Any], expected: list[str], word: str):
    told = report(changes)
    assert takers(changes) == expected
    for engine in set(ENGINES) - set(expected):
        assert any(word in reason for reason in told[engine]["reasons"]), told[engine]
        assert "commands" not in told[engine]


def test_rslora_is_scaled_for_llama_cpp_by_hand():
    # It multiplies by alpha / r, and alpha / sqrt(r) is meant.
    assert report({"use_rslora": True, "r": 64})["llama.cpp"]["commands"][1].endswith("--lora-scaled adapter.gguf:8")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_parts_that_sglang_fills_up_by_itself(targets: list[str]):
    assert takers({"target_modules": targets}) == list(ENGINES)


def test_more_tokens_than_the_base_has():
    assert takers(vocabulary_grown=True) == []


def test_a_head_that_is_shared():
    targets = {"target_modules": ["q_proj", "v_proj", "lm_head"]}
    assert takers(targets) == list(ENGINES) and takers(targets, tied=True) == ["vllm", "sglang"]


def test_architectures_that_an_engine_does_not_know():
    assert _NOT_IN_VLLM | _NOT_IN_SGLANG | _NOT_IN_LLAMA_CPP <= ARCHITECTURES
    assert takers(None, "GPT2LMHeadModel") == ["sglang"]
    # Its Conv1D weights are transposed for llama.cpp, and the factors with them.
    assert takers({"target_modules": ["c_attn"]}, "GPT2LMHeadModel") == []
    assert takers({"target_modules": ["c_attn"]}, "GPTBigCodeForCausalLM") == ["vllm", "llama.cpp"]
    assert takers(None, "OPTForCausalLM") == ["vllm", "sglang"]
    assert takers(None, "MinistralForCausalLM") == [] and takers(None, "NemotronForCausalLM") == ["vllm", "llama.cpp"]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "embed_tokens"], ".*(q_proj|embed_tokens)"])
def test_embeddings_are_served_where_the_engine_declares_them(targets: list[str] | str):
    assert "vllm" in takers({"target_modules": targets})
    assert "vllm" not in takers({"target_modules": targets}, "Qwen2ForCausalLM")
    assert "vllm" in takers({"target_modules": ["q_proj", "v_proj"]}, "Qwen2ForCausalLM")
