"""What is refused as a base model, by its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from common.errors import InvalidInput
from worker.ml.base_check import ARCHITECTURES, base_check

# A safetensors file without a tensor.
EMPTY = b"\x02\0\0\0\0\0\0\0{}"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "vocab_size": 100,
    "num_hidden_layers": 2,
}


def lay_out(folder: Path, *, files: tuple[str, ...] = ("model.safetensors",), **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    for name in ("tokenizer.json", *files):
        (folder / name).write_bytes(EMPTY if name.endswith(".safetensors") else b"{}")
    return folder


def refusal(folder: Path, *, weights: bool = True) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        base_check(folder, weights=weights)
    assert caught.value.param == "model" and caught.value.hint
    assert caught.value.message.startswith("base model: ")
    return caught.value


def test_a_good_base(tmp_path: Path):
    facts = base_check(lay_out(tmp_path))
    assert (facts.architecture, facts.context, facts.vocab_size, facts.num_layers) == ("LlamaForCausalLM", 2048, 100, 2)
    assert not facts.quantized


def test_every_architecture_is_one_that_transformers_has():
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    assert known >= ARCHITECTURES


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["EvilForCausalLM"]}, "'EvilForCausalLM' is not supported"),
        ({"architectures": None}, "None is not supported"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "auto_map"),
        ({"_attn_implementation": "someone/kernel"}, "'someone/kernel'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
    ],
)
def test_a_configuration_that_is_refused(tmp_path: Path, config: dict[str, Any], words: str):
    assert words in refusal(lay_out(tmp_path, **config)).message


def test_files_that_are_missing_or_broken(tmp_path: Path):
    assert "no config.json" in refusal(tmp_path).message
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(tmp_path).message
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(tmp_path).message
    lay_out(tmp_path).joinpath("tokenizer.json").unlink()
    assert "no tokenizer" in refusal(tmp_path).message


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_alone_are_refused(tmp_path: Path, name: str, weights: bool):
    error = refusal(lay_out(tmp_path, files=(name,)), weights=weights)
    assert "pickle" in error.message and name in error.message and "safetensors" in (error.hint or "")
    (tmp_path / "model.safetensors").write_bytes(EMPTY)
    assert base_check(tmp_path)


def test_weights_may_be_absent_before_a_gpu_is_asked_for(tmp_path: Path):
    lay_out(tmp_path, files=())
    assert base_check(tmp_path, weights=False)
    assert "no model.safetensors" in refusal(tmp_path).message


def test_every_shard_of_an_index_is_looked_for(tmp_path: Path):
    index = lay_out(tmp_path, files=("a.safetensors",)) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert "b.safetensors is missing" in refusal(tmp_path).message
    assert base_check(tmp_path, weights=False)
    (tmp_path / "b.safetensors").write_bytes(EMPTY)
    assert base_check(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    assert "../a.safetensors" in refusal(tmp_path).message


def test_a_4_bit_checkpoint_is_known(tmp_path: Path):
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert base_check(lay_out(tmp_path, quantization_config=quantization)).quantized


def test_a_tokenizer_with_code_is_refused(tmp_path: Path):
    lay_out(tmp_path).joinpath("tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "t.T"}}')
    assert "tokenizer_config.json asks for Python code" in refusal(tmp_path).message
