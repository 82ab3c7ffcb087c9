"""Adapters over one base: each row of a batch gets its own, and none leaves a trace."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InvalidInput
from tests.worker.serve.conftest import load, make_adapter
from tests.worker.trainer.tiny import build_base, build_family
from worker.ml.base import keep_training_layout, nf4_config
from worker.ml.precision import Precision
from worker.serve.engine.shared import SharedBase

IDS = torch.tensor([[5, 80, 33, 200, 17, 91], [9, 41, 120, 7, 250, 64], [77, 3, 18, 160, 22, 30]])
# A row in a batch beside others and the row alone: the same sums in another order.
ROUNDING = 1e-5

Folder = Callable[[str], Path]


def logits(shared: SharedBase, rows: list[str | None], ids: torch.Tensor = IDS) -> torch.Tensor:
    """Return what the model says, [rows, tokens, vocabulary]."""
    with shared.wearing(rows) as (model, arguments), torch.no_grad():
        return model(input_ids=ids[: len(rows)], **arguments).logits


def alone(base: Path, folder: Path | None) -> torch.Tensor:
    """Return what stock peft says with that adapter and no other."""
    from peft import PeftModel

    model = load(base) if folder is None else PeftModel.from_pretrained(load(base), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def shared_with(base: Path, adapters: Folder, *kinds: str) -> SharedBase:
    shared = SharedBase(load(base))
    for kind in kinds:
        shared.load(kind, [(adapters(kind), 1.0)])
    return shared


@pytest.mark.parametrize("kinds", [("a", "b"), ("rslora", "expression"), ("a", "rslora")])
def test_rows_of_one_batch_give_what_each_adapter_gives_alone(base: Path, adapters: Folder, kinds: tuple[str, str]):
    shared = shared_with(base, adapters, *kinds)
    mixed = logits(shared, [kinds[0], kinds[1], None])
    for row, kind in enumerate([*kinds, None]):
        wanted = alone(base, adapters(kind) if kind else None)[row]
        assert torch.allclose(mixed[row], wanted, atol=ROUNDING), kind
    same = logits(shared, [kinds[0], kinds[1], None], IDS[:1].expand(3, -1))
    assert min((same[one] - same[other]).abs().max() for one, other in [(0, 1), (0, 2), (1, 2)]) > 1e-2


def test_rows_of_one_batch_give_what_each_adapter_gives_alone_over_a_4_bit_base(base: Path, adapters: Folder):
    from transformers import AutoModelForCausalLM

    config = nf4_config(None, Precision(torch.float32, torch.float32, torch.float32))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    keep_training_layout(model)
    shared = SharedBase(model)
    bare = logits(shared, [None] * 3)
    for kind in ("a", "b"):
        shared.load(kind, [(adapters(kind), 1.0)])
    mixed = logits(shared, ["a", "b", None])
    for row, kind in enumerate(["a", "b", None]):
        assert torch.allclose(mixed[row], logits(shared, [kind] * 3)[row], atol=ROUNDING), kind
    assert (mixed[:2] - bare[:2]).abs().amax(dim=(1, 2)).min() > 1e-2
    for kind in ("a", "b"):
        shared.unload(kind)
    assert torch.equal(logits(shared, [None] * 3), bare)


def test_unloading_brings_the_base_back_bit_for_bit(base: Path, adapters: Folder):
    shared = SharedBase(load(base))
    before = logits(shared, [None] * 3)
    for kind in ("a", "head", "dora"):
        assert shared.load(kind, [(adapters(kind), 1.0)]) > 0
        logits(shared, [kind] * 3)
    assert torch.equal(logits(shared, [None] * 3), before), "rows without an adapter, while some are loaded"
    for kind in ("head", "a", "dora"):
        shared.unload(kind)
        assert torch.equal(logits(shared, [None] * 3), before)
    shared.load("again", [(adapters("a"), 1.0)])
    assert torch.allclose(logits(shared, ["again"] * 3), alone(base, adapters("a")), atol=ROUNDING)


@pytest.mark.parametrize("kinds", [("a", "b"), ("rslora", "a"), ("a", "expression")])
def test_a_weighted_sum_is_the_sum_of_the_deltas(base: Path, adapters: Folder, kinds: tuple[str, str]):
    shared = SharedBase(load(base))
    shared.load("sum", [(adapters(kinds[0]), 0.7), (adapters(kinds[1]), -0.3)])
    wanted = load(base)
    for kind, weight in zip(kinds, (0.7, -0.3), strict=True):
        for name, delta in deltas(base, adapters(kind)).items():
            wanted.get_submodule(name).weight.data += weight * delta
    with torch.no_grad():
        assert torch.allclose(logits(shared, ["sum"] * 3), wanted(input_ids=IDS).logits, atol=ROUNDING)


def deltas(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return what an adapter adds to each weight matrix, by the formula: scale times B times A."""
    from peft import LoraConfig

    config, tensors = LoraConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors}
    return {
        name: scale
        * tensors[f"base_model.model.{name}.lora_B.weight"]
        @ tensors[f"base_model.model.{name}.lora_A.weight"]
        for name in names
    }


def test_one_adapter_can_be_scaled(base: Path, adapters: Folder):
    shared = SharedBase(load(base))
    shared.load("halved", [(adapters("a"), 0.5)])
    wanted = load(base)
    for name, delta in deltas(base, adapters("a")).items():
        wanted.get_submodule(name).weight.data += 0.5 * delta
    with torch.no_grad():
        assert torch.allclose(logits(shared, ["halved"] * 3), wanted(input_ids=IDS).logits, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["dora", "head"])
def test_what_peft_does_not_mix_goes_by_itself_and_disturbs_nobody(base: Path, adapters: Folder, kind: str):
    shared = shared_with(base, adapters, "a", "b", kind)
    assert not shared.shares_batches(kind) and shared.shares_batches("a") and shared.shares_batches(None)
    assert torch.allclose(logits(shared, [kind] * 3), alone(base, adapters(kind)), atol=ROUNDING)
    mixed = logits(shared, ["a", "b", None])
    for row, name in enumerate(["a", "b", None]):
        assert torch.allclose(mixed[row], alone(base, adapters(name) if name else None)[row], atol=ROUNDING), name
    assert torch.allclose(logits(shared, [kind] * 3), alone(base, adapters(kind)), atol=ROUNDING)
    with pytest.raises(ValueError, match="share no batch"):
        logits(shared, [kind, "a", None])
    with pytest.raises(InvalidInput, match="cannot be weighted"):
        shared.load("sum", [(adapters(kind), 0.5), (adapters("a"), 0.5)])


def test_an_adapter_that_changes_the_base_itself_is_refused(tmp_path: Path, base: Path, adapters: Folder):
    with_bias = tmp_path / "with-bias"
    gpt = build_family(tmp_path / "gpt2", "gpt2", n_embd=32, n_layer=1, n_head=2)
    make_adapter(with_bias, gpt, 1, r=4, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    with pytest.raises(InvalidInput, match="changes the base itself"):
        SharedBase(load(gpt)).load("bias", [(with_bias, 1.0)])
    shared = SharedBase(load(base))
    before = logits(shared, [None] * 3)
    shape = tuple(load(base).get_input_embeddings().weight.shape)
    altered = altered_copy(adapters("a"), tmp_path / "stray", {"base_model.model.model.embed_tokens.weight": shape})
    with pytest.raises(InvalidInput, match=r"changes the base itself.*embed_tokens"):
        shared.load("stray", [(altered, 1.0)])
    assert torch.equal(logits(shared, [None] * 3), before)


def test_tied_ends_that_were_trained_lie_over_the_base_and_leave_it_tied(tmp_path: Path):
    tied = build_base(tmp_path / "tied", tie_word_embeddings=True)
    config = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(tmp_path / "adapter", tied, 1, **config)
    shared = SharedBase(load(tied))
    before = logits(shared, [None] * 3)
    shared.load("tied", [(adapter, 1.0)])
    assert torch.equal(logits(shared, [None] * 3), before)
    with_it = logits(shared, ["tied"] * 3)
    assert torch.allclose(with_it, alone(tied, adapter), atol=ROUNDING) and (with_it - before).abs().max() > 1e-2
    shared.unload("tied")
    assert torch.equal(logits(shared, [None] * 3), before)
    with shared.wearing([None]) as (model, _):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_others_alone(
    tmp_path: Path, base: Path, adapters: Folder
):
    shared = shared_with(base, adapters, "b")
    before = logits(shared, ["b"] * 3)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    wrong = {"shape": {key: (8, 99)}, "missing": {key: None}}
    for name, changes in wrong.items():
        folder = altered_copy(adapters("a"), tmp_path / name, changes)
        with pytest.raises(InvalidInput, match="does not fit"):
            shared.load(name, [(folder, 1.0)])
        with pytest.raises(InvalidInput, match="does not fit"):
            shared.load(name, [(adapters("a"), 0.5), (folder, 0.5)])
        assert torch.equal(logits(shared, ["b"] * 3), before)
    with shared.wearing([None]) as (model, _):
        assert {part for path, _ in model.named_parameters() if "lora" in path for part in path.split(".")} >= {"b"}
        assert not [path for path, _ in model.named_parameters() if set(path.split(".")) & set(wrong)]
    shared.load("shape", [(adapters("a"), 1.0)])
    assert torch.allclose(logits(shared, ["shape"] * 3), alone(base, adapters("a")), atol=ROUNDING)


def altered_copy(folder: Path, copy: Path, changes: dict[str, tuple[int, ...] | None]) -> Path:
    """Copy an adapter, with tensors of other shapes, or without some."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.ones(shape)
    save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return copy


def test_adapters_that_want_one_module_each_their_way_do_not_end_each_other(tmp_path: Path, base: Path):
    layered = make_adapter(tmp_path / "layered", base, 1, r=4, target_modules=["lm_head", "q_proj"])
    whole = make_adapter(tmp_path / "whole", base, 2, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for first, second in ((layered, whole), (whole, layered)):
        shared = SharedBase(load(base))
        shared.load("first", [(first, 1.0)])
        before = logits(shared, ["first"])
        with pytest.raises(InvalidInput, match="beside the adapters that lie on it now"):
            shared.load("second", [(second, 1.0)])
        assert torch.equal(logits(shared, ["first"]), before)
        shared.unload("first")
        assert torch.equal(logits(shared, [None]), alone(base, None)[:1])
        shared.load("third", [(second, 1.0)])
        assert torch.allclose(logits(shared, ["third"]), alone(base, second)[:1], atol=ROUNDING)
