"""The report on precision says of every module how its weights are held, and the sums agree with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.schemas.precision import ModulePrecision, PrecisionRead
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from worker.ml.towers import empty_model

PROJECTION = "model.layers.0.self_attn.q_proj"
METHODS = ("qlora", "lora", "full")


def report_of(made: Attempt) -> tuple[PrecisionRead, dict[str, ModulePrecision]]:
    text = (made.folder / "out" / "reports" / "precision.json").read_text()
    assert "class" in json.loads(text)["modules"][0]
    report = PrecisionRead.model_validate_json(text)
    assert report.model_dump(exclude={"modules"}) == made.result["precision"]
    lines = {line.name: line for line in report.modules}
    assert len(lines) == len(report.modules)
    assert made.run
    shared = lines["lm_head"].parameters if made.run.model.config.tie_word_embeddings else 0
    assert sum(line.parameters for line in report.modules) == made.result["total_parameters"] + shared
    assert sum(line.trained for line in report.modules) == made.result["trainable_parameters"]
    return report, lines


def held(line: ModulePrecision) -> tuple[Any, ...]:
    return (line.kind, line.dtype, line.bits, line.parameters, line.status)


def test_a_qlora_base_is_quantised_but_for_its_ends(go: Go, tmp_path: Path):
    base = tiny.build_base(tmp_path / "biased", attention_bias=True)
    lora = {"bias": "lora_only", "target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    made = go(max_steps=1, base=base, lora=lora, quantization={"bnb_4bit_compute_dtype": "float32"})
    report, lines = report_of(made)
    assert held(lines[f"{PROJECTION}.base_layer"]) == ("Linear4bit", "nf4", 4, 64 * 64 + 64, "quantized")
    assert lines[f"{PROJECTION}.base_layer"].trained == 64, "the bias"
    assert held(lines["model.layers.0.mlp.up_proj"]) == ("Linear4bit", "nf4", 4, 128 * 64, "quantized")
    assert held(lines[f"{PROJECTION}.lora_A.default"]) == ("Linear", "float32", 32, 16 * 64, "trained")
    assert lines["model.embed_tokens"].status == lines["lm_head"].status == "not_quantizable"
    assert held(lines["model.layers.1.input_layernorm"]) == ("LlamaRMSNorm", "float32", 32, 64, "frozen")
    assert lines["model.norm.original_module"].status == "frozen"
    assert lines["model.norm.modules_to_save.default"].status == "trained"
    assert set(report.left_in_16_bit) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(("method", "status"), [("lora", "frozen"), ("full", "trained")])
def test_a_base_in_16_bit_has_nothing_to_quantise(go: Go, method: str, status: str):
    made = go(max_steps=1, method=method)
    _, lines = report_of(made)
    projection = f"{PROJECTION}.base_layer" if method == "lora" else PROJECTION
    dtype, bits = ("bfloat16", 16) if method == "lora" else ("float32", 32)
    assert held(lines[projection]) == ("Linear", dtype, bits, 64 * 64, status)
    assert {line.status for line in lines.values()} == ({"frozen", "trained"} if method == "lora" else {"trained"})


def test_the_footprint_is_that_of_16_bit_weights_and_of_what_was_held(go: Go, base: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    measured = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).get_memory_footprint()
    assert empty_model(AutoConfig.from_pretrained(base)).get_memory_footprint() == measured
    sizes = {method: go(max_steps=1, method=method).result["precision"]["memory_footprint"] for method in METHODS}
    assert {size["before_bytes"] for size in sizes.values()} == {measured}
    assert sizes["lora"]["after_bytes"] == measured
    # The 73,728 weights of the linear layers take half a byte instead of two; 4 bytes in a full fine-tune.
    assert sizes["qlora"]["after_bytes"] == measured - 73728 * 3 // 2
    assert sizes["full"]["after_bytes"] == pytest.approx(2 * measured, rel=0.01)
    note = go(max_steps=1).notes("base.quantized")[0]
    assert {name: note.data[name] for name in sizes["qlora"]} == sizes["qlora"]


def test_the_convolutions_of_gpt2_are_quantised_and_trained(go: Go, tmp_path: Path):
    # transformers puts a Linear4bit in the place of a Conv1D, and transposes its weight.
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    base = tiny.build_family(tmp_path / "gpt2", "gpt2", **shape, embd_pdrop=0.0)
    lora = {"target_modules": ["c_attn", "c_fc", "c_proj"], "lora_dropout": 0.0}
    four, sixteen = (go(base=base, method=method, lora=lora, max_steps=6) for method in ("qlora", "lora"))
    _, lines = report_of(four)
    assert held(lines["transformer.h.0.attn.c_attn.base_layer"])[:3] == ("Linear4bit", "nf4", 4)
    _, lines = report_of(sixteen)
    assert held(lines["transformer.h.0.attn.c_attn.base_layer"])[:3] == ("Conv1D", "bfloat16", 16)
    for made in (four, sixteen):
        assert made.losses[-1] < made.losses[0] - 0.1
        moved = {name for name, tensor in made.weights().items() if "lora_B" in name and tensor.abs().max() > 1e-3}
        assert len(moved) == 2 * 4
    # What is quantised is the same function but for the rounding: a weight left untransposed would be another one.
    assert four.losses[0] == pytest.approx(sixteen.losses[0], abs=0.05)


def test_peft_prepares_the_base_only_where_that_is_asked_for(go: Go):
    lean, prepared = (go(max_steps=1, quantization={"prepare_kbit_training": flag}) for flag in (False, True))
    for made, dtype in ((lean, "bfloat16"), (prepared, "float32")):
        _, lines = report_of(made)
        assert {lines[name].dtype for name in ("model.embed_tokens", "lm_head", "model.norm")} == {dtype}
        assert lines[f"{PROJECTION}.base_layer"].dtype == "nf4"
    # 349 words at each end, and five norms: two bytes more for each of their weights.
    cost = 2 * (2 * 349 * 64 + 5 * 64)
    sizes = [made.result["precision"]["memory_footprint"] for made in (lean, prepared)]
    assert [size["kbit_preparation_bytes"] for size in sizes] == [0, cost]
    assert sizes[1]["after_bytes"] - sizes[0]["after_bytes"] == cost
    assert prepared.notes("base.prepared")[0].data == {"bytes": cost} and not lean.notes("base.prepared")
    assert prepared.losses != lean.losses and prepared.losses == pytest.approx(lean.losses, abs=0.02)
