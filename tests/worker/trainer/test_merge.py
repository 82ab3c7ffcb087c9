"""Merging by itself: every form of adapter into every family of base, and merges that are broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.schemas.lora import Lora
from tests.worker.trainer import tiny
from tests.worker.trainer.test_families import FAMILIES
from worker.ml import merge
from worker.ml.adapters import attach, factors, save_adapter
from worker.ml.agreement import answers, difference, fp32_arithmetic
from worker.ml.base import keep_training_layout, load_weights, nf4_config
from worker.ml.merge import Ingredients, Merger, MergeRefused
from worker.ml.precision import Precision

CPU = torch.device("cpu")
ROWS = [list(range(3, 40)), list(range(60, 90))]
FOUR_BIT = nf4_config(None, Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16))
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(base: Path, folder: Path, strength: float = 0.05, **lora: Any) -> Path:
    """Write an adapter for `base` whose every trained weight was moved by noise."""
    asked = Lora.model_validate({"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0} | lora)
    model = attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), asked)
    initial = factors(model) if asked.changes_base else None
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += strength * torch.randn(parameter.shape, generator=noise)
    save_adapter(model, folder, initial)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def merger(base: Path, adapter: Path, scratch: Path, **changes: Any) -> Merger:
    known = {"device": CPU, "rows": ROWS, "four_bit": FOUR_BIT, "trained_in_4bit": True, "stored_in_4bit": False}
    return Merger(Ingredients(base, adapter, **(known | changes)), scratch)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules=EVERYTHING)


FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"bias": "all"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_adapter_is_merged(base: Path, tmp_path: Path, form: str):
    adapter = write_adapter(base, tmp_path / "adapter", **FORMS[form])
    report = merger(base, adapter, tmp_path / "scratch").make("merged", tmp_path / "merged")
    gap = report["from_adapter_on_16_bit_base"]
    assert gap["relative"] < report["tolerance"] < 0.2 * report["adapter_changes"]["relative"]


SHARING: list[dict[str, Any]] = [
    {}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["embed_tokens", "v_proj"]},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("lora", SHARING)
def test_a_base_that_shares_its_embeddings_with_its_head(tmp_path: Path, lora: dict[str, Any]):
    base = tiny.build_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_adapter(base, tmp_path / "adapter", **lora)
    report = merger(base, adapter, tmp_path / "scratch").make("merged", tmp_path / "merged")
    assert report["adapter_changes"]["relative"] > 5 * report["tolerance"]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2", "gemma3_text", "phi3", "qwen3", "cohere"])
def test_every_family_is_merged(tmp_path: Path, model_type: str):
    base = tiny.build_family(tmp_path / "base", model_type, **FAMILIES[model_type])
    adapter = write_adapter(base, tmp_path / "adapter", strength=0.3, target_modules="all-linear")
    made = merger(base, adapter, tmp_path / "scratch")
    made.make("merged_dequantized", tmp_path / "dequantized")
    report = made.make("merged", tmp_path / "merged")
    # These are stored in fp32, and merged in fp32.
    assert report["dtype"] == "float32" and report["tolerance"] == pytest.approx(1e-4)


def test_the_weights_are_the_formulas(base: Path, adapter: Path, tmp_path: Path):
    made = merger(base, adapter, tmp_path / "scratch")
    name = "model.layers.1.self_attn.q_proj.weight"
    stored, lora = load_file(base / "model.safetensors")[name], load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{name.replace('weight', '')}lora_{part}.weight"].float() for part in "AB")
    four_bit = load_weights(base, "auto", CPU, FOUR_BIT).model.layers[1].self_attn.q_proj.weight
    coarse = dequantize_4bit(four_bit.data, four_bit.quant_state)
    for form, begun in {"merged": stored, "merged_dequantized": coarse}.items():
        made.make(form, tmp_path / form)
        merged = load_file(tmp_path / form / "model.safetensors")[name]
        assert merged.dtype == torch.bfloat16 and not torch.equal(merged, begun)
        assert torch.equal(merged, (begun.float() + 2 * b @ a).to(torch.bfloat16)), form
    assert not torch.equal(stored, coarse)


def scale_a_weight(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data *= 1.1


def forget_a_layer(model: Any) -> None:
    source = load_weights(Path(model.name_or_path), "auto", CPU)
    model.model.layers[1].mlp.down_proj.weight.data = source.model.layers[1].mlp.down_proj.weight.data


def swap_two(model: Any) -> None:
    first, second = (layer.self_attn.o_proj.weight for layer in model.model.layers)
    first.data, second.data = second.data, first.data


def put_in_a_nan(model: Any) -> None:
    model.lm_head.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize("breaks", [scale_a_weight, forget_a_layer, swap_two, put_in_a_nan])
@pytest.mark.parametrize("form", ["merged", "merged_dequantized"])
def test_a_broken_merge_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Any], None], form: str
):
    honest = LoraModel.merge_and_unload

    def broken(model: LoraModel) -> Any:
        merged = honest(model)
        breaks(merged)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", broken)
    made = merger(base, adapter, tmp_path / "scratch")
    with pytest.raises(MergeRefused) as refusal:
        made.make(form, tmp_path / form)
    assert refusal.value.code == "merge_differs" and form in refusal.value.message
    assert not (tmp_path / form).exists()
    with pytest.raises(MergeRefused):
        made.make("merged_4bit", tmp_path / "merged_4bit")
    assert not (tmp_path / "merged_4bit").exists()


def test_the_4_bit_forms_state_what_they_cost(base: Path, adapter: Path, tmp_path: Path):
    made = merger(base, adapter, tmp_path / "scratch")
    coarse = made.make("merged_dequantized", tmp_path / "merged_dequantized")
    small = made.make("merged_4bit", tmp_path / "merged_4bit")
    # What was trained is what the dequantised base gives back; quantising the merged model loses more.
    assert coarse["from_adapter_on_4_bit_base"]["relative"] < coarse["tolerance"]
    assert coarse["from_adapter_on_16_bit_base"]["relative"] > 3 * coarse["tolerance"]
    assert small["from_adapter_on_4_bit_base"]["relative"] > 3 * coarse["tolerance"] and "tolerance" not in small
    assert small["dtype"] == "nf4" and small["from_adapter_on_16_bit_base"]["top1"] <= 1
    config = json.loads((tmp_path / "merged_4bit" / "config.json").read_text())["quantization_config"]
    assert (config["load_in_4bit"], config["bnb_4bit_quant_type"]) == (True, "nf4")
    assert "quantization_config" not in (tmp_path / "merged_dequantized" / "config.json").read_text()
    weights = load_file(tmp_path / "merged_4bit" / "model.safetensors")
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint8
    # Not the base quantised: the adapter is in it.
    bare = load_weights(base, "auto", CPU, FOUR_BIT).model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], bare.data)


def test_a_base_that_is_stored_in_4_bit(base: Path, adapter: Path, tmp_path: Path):
    stored = tmp_path / "stored"
    load_weights(base, "auto", CPU, FOUR_BIT).save_pretrained(stored)
    AutoTokenizer.from_pretrained(base).save_pretrained(stored)
    made = merger(stored, adapter, tmp_path / "scratch", stored_in_4bit=True)
    small = made.make("merged_4bit", tmp_path / "merged_4bit")
    assert "from_adapter_on_16_bit_base" not in small and small["from_adapter_on_4_bit_base"]["relative"] > 0
    made.make("merged_dequantized", tmp_path / "merged_dequantized")
    assert load_file(tmp_path / "merged_dequantized" / "model.safetensors")[
        "model.layers.0.self_attn.q_proj.weight"
    ].dtype == torch.bfloat16  # fmt: skip


def test_a_large_model_is_written_in_shards(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merge, "SHARD_SIZE", "100KB")
    target = tmp_path / "merged"
    merger(base, adapter, tmp_path / "scratch").make("merged", target)
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)


def test_an_invalid_generation_config_is_copied_as_it_is(base: Path, adapter: Path, tmp_path: Path):
    # Llama 2's own: the library refuses to write it.
    odd = json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    copy = tmp_path / "base"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "generation_config.json").unlink()
    (copy / "generation_config.json").write_text(odd)
    merger(copy, adapter, tmp_path / "scratch").make("merged", tmp_path / "merged")
    assert (tmp_path / "merged" / "generation_config.json").read_text() == odd


@pytest.mark.parametrize("model_type", ["llama", *FAMILIES])
def test_fp32_arithmetic_is_that_of_a_widened_model(tmp_path: Path, model_type: str):
    shapes = FAMILIES.get(model_type, FAMILIES["mistral"])
    folder = tiny.build_family(tmp_path / "base", model_type, **shapes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ours = answers(model, ROWS)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    with torch.no_grad():
        rounded = model(input_ids=torch.tensor([ROWS[0]])).logits[0]
        wide = [model.float()(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    for one, other in zip(ours, wide, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-5)
    assert not torch.equal(ours[0], rounded.float())


def test_fp32_arithmetic_of_4_bit_weights_is_that_of_their_16_bit_values(base: Path):
    model = load_weights(base, "auto", CPU, FOUR_BIT)
    keep_training_layout(model)
    ours = answers(model, ROWS)
    with fp32_arithmetic(model), pytest.raises(TypeError):
        model(input_ids="no ids")  # the weights are put back after an error too
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    plain = model.dequantize()
    assert torch.equal(torch.cat(ours), torch.cat(answers(plain, ROWS)))


def test_a_difference_is_measured():
    first = [torch.tensor([[2.0, 0.0], [0.0, 2.0]])]
    same = difference(first, [first[0] + 3.0])
    assert same.relative == pytest.approx(0) and same.kl == pytest.approx(0) and same.top1 == 1
    flipped = difference(first, [torch.tensor([[2.0, 0.0], [2.0, 0.0]])])
    assert flipped.relative == pytest.approx(2**0.5) and flipped.top1 == 0.5 and flipped.max_abs == 2
    chance = torch.tensor(2.0).sigmoid().item()
    assert flipped.kl == pytest.approx((chance - (1 - chance)) * 2 / 2)
    assert difference(first, [first[0] * float("nan")]).rounded()["max_abs"] is None
