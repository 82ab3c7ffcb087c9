"""Every form of adapter: trained in the way that was asked for, and loaded by stock peft with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.errors import InvalidInput
from common.schemas.lora import Lora
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Attempt, Go
from tests.worker.trainer.test_resume import resumed
from worker.ml.adapters import WEIGHTS, attach, factors, missing_biases, save_adapter, set_adapter_dtype
from worker.ml.base import keep_training_layout
from worker.trainer import protocol

SIXTEEN_BIT = {"load_in_4bit": False, "bnb_4bit_compute_dtype": "float32"}
FOUR_BIT = {"bnb_4bit_compute_dtype": "float32"}


def train(go: Go, method: str, lora: dict[str, Any], **options: Any) -> Attempt:
    made = go(method=method, lora=lora, quantization=FOUR_BIT if method == "qlora" else SIXTEEN_BIT, **options)
    assert made.code == protocol.DONE, made.messages[-1]
    return made


@torch.no_grad()
def logits(model: Any, made: Attempt) -> torch.Tensor:
    assert made.run
    result: torch.Tensor = model.eval()(input_ids=torch.tensor([made.run.train_rows[0]["input_ids"]])).logits
    return result


def stock_base(base: Path, method: str) -> Any:
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": four_bit} if method == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    # bitsandbytes 0.50 repacks a layer for inference on AVX512-BF16, and peft's DoRA then reads the packed bytes.
    keep_training_layout(model)
    return model


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("qlora", {"use_dora": True}),
    "dora_16": ("lora", {"use_dora": True, "target_modules": "all-linear"}),
    "rslora": ("qlora", {"use_rslora": True, "r": 8}),
    "orthogonal": ("lora", {"init_lora_weights": "orthogonal"}),
    "pissa": ("lora", {"init_lora_weights": "pissa", "target_modules": "all-linear"}),
    "pissa_rslora": ("lora", {"init_lora_weights": "pissa", "use_rslora": True, "modules_to_save": ["norm"]}),
    "olora": ("lora", {"init_lora_weights": "olora"}),
    "embedding": ("qlora", {"target_modules": ["embed_tokens", "q_proj"]}),
    "both_ends": ("qlora", {"modules_to_save": ["embed_tokens", "lm_head"], "bias": "all"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_stock_peft_gives_the_trainers_logits(go: Go, base: Path, form: str):
    method, lora = FORMS[form]
    made = train(go, method, lora)
    assert made.run
    ours, bare = logits(made.run.model, made), logits(stock_base(base, method), made)
    model = PeftModel.from_pretrained(stock_base(base, method), made.folder / "out" / "adapter")
    assert (ours - bare).abs().max() > 0.05
    assert torch.allclose(ours, logits(model, made), atol=2e-4)


def test_dora_trains_magnitudes_in_fp32(go: Go):
    # In bf16 compute: TRL would leave the magnitudes alone, and everything else that is trained in bf16.
    lora = {"use_dora": True, "modules_to_save": ["norm"]}
    moved, still = go(lora=lora), go(lora=lora, learning_rate=1e-12, max_steps=1)
    assert moved.run
    names = [name for name in moved.weights() if name.endswith("lora_magnitude_vector")]
    assert len(names) == 8
    for name in names:
        after, before = moved.weights()[name], still.weights()[name]
        assert after.dtype == torch.float32 and (after - before).abs().max() > 1e-3
    assert moved.weights()["base_model.model.model.norm.weight"].dtype == torch.float32
    assert {t.dtype for name, t in moved.weights().items() if "lora_A" in name} == {moved.run.precision.adapter}


def attached(base: Path, *, four_bit: bool = False, **lora: Any) -> PeftModel:
    """Return the base with an adapter, before any training."""
    torch.manual_seed(0)
    model = attach(stock_base(base, "qlora" if four_bit else "lora"), Lora(**lora))
    set_adapter_dtype(model, torch.float32)
    return model


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def test_rank_stabilised_lora_scales_by_the_root(base: Path):
    model = attached(base, r=4, lora_alpha=8.0, use_rslora=True)
    assert model.get_submodule(QUERY).scaling["default"] == 4.0
    assert attached(base, r=4, lora_alpha=8.0).get_submodule(QUERY).scaling["default"] == 2.0


def test_adapters_begin_as_asked(base: Path):
    first = {
        init: factors(attached(base, r=4, init_lora_weights=init)) for init in (True, False, "gaussian", "orthogonal")
    }
    a, b = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
    assert first[True][b].abs().max() == 0 < 1e-2 < first[False][b].abs().max()
    # Uniform within 1 / sqrt(64) is a deviation of 0.072; the Gaussian one is 1 / r.
    assert first[True][a].std() == pytest.approx(0.072, abs=0.01)
    assert first["gaussian"][a].std() == pytest.approx(0.25, abs=0.03)
    product = first["orthogonal"][b] @ first["orthogonal"][a]
    assert product.abs().max() < 1e-6 and first["orthogonal"][b].abs().max() > 1e-2


def test_each_way_takes_its_own_part_out_of_the_base(base: Path):
    left = {}
    for init in ("pissa", "pissa_niter_1", "pissa_niter_16", "olora"):
        layer: Any = attached(base, r=4, lora_alpha=8.0, init_lora_weights=init).get_submodule(QUERY)
        left[init] = float(layer.base_layer.weight.norm())
    # Nothing of rank 4 leaves less than the exact decomposition; the iterations come near it; QR seeks no such thing.
    assert left["pissa"] + 1e-5 < left["pissa_niter_16"] < left["pissa_niter_1"] < left["olora"]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_was_taken_out_of_the_base_is_given_back(base: Path, tmp_path: Path, init: str):
    plain, model = stock_base(base, "lora").eval(), attached(base, r=4, lora_alpha=8.0, init_lora_weights=init).eval()
    ids = torch.arange(20)[None]
    # The function is the same before the first step, though a part of the base has moved into the adapter.
    assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)
    name = "model.layers.0.self_attn.q_proj"
    assert (model.get_submodule(QUERY).base_layer.weight - plain.get_submodule(name).weight).abs().max() > 1e-2
    # Untrained, the published adapter changes nothing of the untouched base.
    save_adapter(model, tmp_path, factors(model))
    config, weights = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / WEIGHTS)
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert weights[f"{QUERY}.lora_A.weight"].shape[0] == 8
    assert (weights[f"{QUERY}.lora_B.weight"] @ weights[f"{QUERY}.lora_A.weight"]).abs().max() < 1e-6


def test_whole_modules_are_trained_and_the_rest_is_not(go: Go, base: Path):
    made = go(lora={"modules_to_save": ["lm_head", "model.norm"]})
    stored = load_file(base / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert (made.weights()[f"base_model.model.{name}"] - stored[name]).abs().max() > 1e-3
    whole = {name.removeprefix("base_model.model.") for name in made.weights() if "lora_" not in name}
    assert whole == {"lm_head.weight", "model.norm.weight"}
    assert made.result["trainable_parameters"] == 14336 + stored["lm_head.weight"].numel() + 64


def test_a_tied_embedding_is_trained_at_both_ends(go: Go, tmp_path: Path):
    tied = tiny.build_base(tmp_path / "tied", tie_word_embeddings=True)
    made = train(go, "qlora", {"modules_to_save": ["embed_tokens"]}, base=tied)
    assert made.run
    model = made.run.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    theirs = PeftModel.from_pretrained(stock_base(tied, "qlora"), made.folder / "out" / "adapter")
    assert torch.allclose(logits(model, made), logits(theirs, made), atol=2e-4)


RESUMED: dict[str, dict[str, Any]] = {
    "whole_modules": {"lora": {"modules_to_save": ["embed_tokens", "norm"], "lora_dropout": 0.2}, "tied": True},
    "dora_embedding": {"lora": {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}},
    "pissa": {"method": "lora", "lora": {"init_lora_weights": "pissa_niter_4", "bias": "all"}},
    "biases": {"lora": {"bias": "all"}, "biased": True},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bit_for_bit(go: Go, base: Path, tmp_path: Path, name: str):
    options = dict(RESUMED[name])
    if options.pop("tied", False):
        options["base"] = tiny.build_base(tmp_path / "tied", tie_word_embeddings=True)
    if options.pop("biased", False):
        options["base"] = tiny.build_base(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    whole = go(max_steps=4, save_steps=2, **options)
    assert whole.code == protocol.DONE, whole.messages[-1]
    again = resumed(whole, 2, base, tmp_path)
    assert again.adapter_bytes() == whole.adapter_bytes()
    assert again.losses == whole.losses[2:]


def test_a_checkpoint_holds_what_is_trained_and_no_more(go: Go):
    made = go(max_steps=1, lora={"target_modules": ["embed_tokens"]})
    stored = load_file(made.folder / "checkpoints" / "step-00000001" / "adapter_model.safetensors")
    assert {name.split(".")[-1] for name in stored} == {"lora_embedding_A", "lora_embedding_B"}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "nothing": ({"modules_to_save": ["wte"]}, "no module: 'wte'", "embed_tokens (1 times)"),
    "partly": ({"target_modules": ["q_proj", "query"]}, "nothing for these: 'query'", "q_proj (2 times)"),
    "no_form": ({"target_modules": ["mlp"]}, "'model.layers.0.mlp' is neither a linear layer", "q_proj (2 times)"),
    "no_weights": ({"modules_to_save": ["rotary_emb"]}, "has no weights", ""),
    "head": ({"target_modules": ["lm_head"]}, "cannot carry an adapter", "modules_to_save"),
    "in_4_bit": ({"modules_to_save": ["model.layers.0.mlp"]}, "held in 4 bit", "target_modules"),
    "twice": ({"modules_to_save": ["model.embed_tokens"], "target_modules": ["embed_tokens"]}, "a target too", ""),
    "within": (
        {"modules_to_save": ["layers.1"]},
        "'model.layers.1' has the target 'model.layers.1.self_attn.k_proj'",
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(base: Path, name: str):
    lora, message, hint = REFUSED[name]
    with pytest.raises(InvalidInput) as refused:
        attached(base, four_bit=True, **lora)
    assert refused.value.param in ("lora.target_modules", "lora.modules_to_save")
    assert message in refused.value.message and hint in (refused.value.hint or "")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_no_more_parts_are_taken_out_of_a_weight_than_it_has(base: Path, init: str):
    # The two key heads make 32 rows.
    assert attached(base, r=32, init_lora_weights=init)
    with pytest.raises(InvalidInput, match=r"33 parts.*layers\.0\.self_attn\.k_proj' has 32") as refused:
        attached(base, r=33, init_lora_weights=init)
    assert refused.value.param == "lora.r"


# peft does not know again what it has tied, but finds the head in the file.
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize("lora", [{"modules_to_save": ["wte"]}, {"bias": "all"}], ids=["embedding", "biases"])
def test_a_base_with_layer_norms_trains_more_than_matrices(go: Go, tmp_path: Path, lora: dict[str, Any]):
    # In bf16 compute, as a CPU that has it takes by itself.
    base = tiny.build_family(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=128)
    made = go(base=base, method="lora", lora={"target_modules": ["c_attn"], **lora})
    assert made.code == protocol.DONE and made.run
    head, embedding = made.run.model.get_output_embeddings(), made.run.model.get_input_embeddings()
    assert head.weight is embedding.weight
    norms = [module for module in made.run.model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms and {norm.weight.dtype for norm in norms} == {torch.float32}
    theirs = PeftModel.from_pretrained(stock_base(base, "lora"), made.folder / "out" / "adapter")
    ours = logits(made.run.model.float(), made)
    # One holds the frozen weights in bf16, where that is computed in.
    assert (ours - logits(theirs, made)).norm() < 0.02 * ours.norm()


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("has", [True, False])
def test_biases_that_are_not_there_are_told(tmp_path: Path, bias: str, has: bool):
    model = attached(tiny.build_base(tmp_path, attention_bias=has), bias=bias)
    told = missing_biases(model, Lora(bias=bias))
    assert [choice.name for choice in told] == (["bias.missing"] if bias != "none" and not has else [])


def test_olora_is_refused_on_conv1d(tmp_path: Path):
    base = tiny.build_family(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=128)
    with pytest.raises(InvalidInput, match="Conv1D"):
        attached(base, init_lora_weights="olora", target_modules=["c_attn"])
