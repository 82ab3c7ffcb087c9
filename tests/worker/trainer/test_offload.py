"""A base that the card does not hold: layers wait in host memory, the run is the same, and only two visit at once.

On a CPU host and card are the same memory, so the copies are real and the saving is counted instead of measured.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from common.errors import InvalidInput
from common.schemas.lora import Quantization
from tests.worker.trainer import tiny
from tests.worker.trainer.conftest import Go
from worker.ml import base as loading
from worker.ml.offload import Visits, plan_offload
from worker.ml.towers import empty_model
from worker.trainer import protocol

AUTO = {"device_map": "auto"}


def room(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    monkeypatch.setattr(loading, "room_for_weights", lambda _device: size)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    return tiny.build_base(tmp_path / "deep", num_hidden_layers=6)


def test_an_8b_is_planned_by_what_its_layers_take():
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=128256, num_attention_heads=32, **shape)
    empty, asked = empty_model(config), Quantization()
    # 3.60 GB in 4 bit and 2.10 GB of embedding and head.
    assert plan_offload(empty, asked, None, 5_710_000_000) is None
    plan = plan_offload(empty, asked, None, 5_690_000_000)
    assert plan is not None and plan.layers == ("model.layers.29", "model.layers.30", "model.layers.31")
    tight = plan_offload(empty, asked, None, 3_000_000_000)
    assert tight is not None and len(tight.layers) == 27 and tight.card_bytes <= 3_000_000_000
    assert tight.host_bytes == pytest.approx(27 * 112.5e6, rel=0.01)
    single = plan_offload(empty, Quantization(bnb_4bit_use_double_quant=False), None, 5_710_000_000)
    assert single is not None, "scales of four bytes take more"
    with pytest.raises(InvalidInput, match=r"embeddings, head and 2 layers take 2\.33 GB"):
        plan_offload(empty, asked, None, 2_000_000_000)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"modules_to_save": ["lm_head"], "bias": "all"},
        # No adapter on a layer's last linear: its backward pass comes before anything is recomputed.
        {"target_modules": r"model\.layers\.[13]\.self_attn\.q_proj"},
    ],
)
def test_the_run_is_the_same_bit_for_bit(go: Go, deep: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any]):
    options: dict[str, Any] = {"base": deep, "lora": lora, "validation": tiny.chat_rows(3)}
    plain = go(**options)
    room(monkeypatch, 160_000)
    offloaded = go(**options, quantization=AUTO)
    assert offloaded.code == protocol.DONE, offloaded.messages[-1]
    note = offloaded.notes("base.offloaded")[0]
    assert note.level == "warning" and note.data["layers"] == 5
    assert offloaded.result["offload"]["layers"] == note.data["layers"]
    assert offloaded.losses == plain.losses and offloaded.adapter_bytes() == plain.adapter_bytes()
    assert offloaded.result["eval_loss"] == plain.result["eval_loss"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_that_is_quantised_in_place_is_what_the_library_makes(
    go: Go, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
):
    shape = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
    base = deep if family == "llama" else tiny.build_family(tmp_path / "gpt2", "gpt2", **shape)
    options: dict[str, Any] = {"base": base, "max_steps": 1, "lora": {"target_modules": "all-linear"}}
    plain = go(**options)
    room(monkeypatch, 140_000)
    made = go(**options, quantization=AUTO)
    assert made.notes("base.offloaded"), made.messages[-1]
    assert made.run and plain.run and made.losses == plain.losses
    ours, theirs = (dict(one.run.model.named_parameters()) for one in (made, plain))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter.data, theirs[name].data) and parameter.dtype == theirs[name].dtype, name
    assert made.run.held.modules == plain.run.held.modules


def test_two_layers_visit_and_the_others_wait():
    layers = [torch.nn.Sequential(Linear4bit(64, 64, bias=False).to("cpu")) for _ in range(5)]
    hosts = [layer[0].weight.data_ptr() for layer in layers]
    expected = [layer[0](torch.ones(1, 64)) for layer in layers]
    Visits(layers, torch.device("cpu"))
    seen: list[set[int]] = []
    for index in (0, 1, 2, 3, 4, 4, 3, 2, 1, 0):
        assert torch.equal(layers[index](torch.ones(1, 64)), expected[index])
        moved = {other for other, layer in enumerate(layers) if layer[0].weight.data_ptr() != hosts[other]}
        seen.append(moved)
    assert seen == [{0}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {3, 4}, {3, 4}, {2, 4}, {1, 2}, {0, 1}]


def test_no_more_than_two_layers_are_kept_by_the_graph():
    # No other tensor of these tests has this size.
    size = 88 * 56 // 2
    layers = [
        torch.nn.Sequential(*(Linear4bit(*shape, bias=False).to("cpu") for shape in ((88, 56), (56, 88))))
        for _ in range(6)
    ]

    def passed() -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.ones(3, 88, requires_grad=True)
        value = start
        for layer in layers:
            value = checkpoint(layer, value, use_reentrant=False)
        return start, value.square().sum()

    def gradient() -> torch.Tensor:
        start, end = passed()
        end.backward()
        assert start.grad is not None
        return start.grad

    expected = gradient()
    Visits(layers, torch.device("cpu"))
    hosted = len(layers) * 2 * size
    begun = passed()
    assert live_bytes(size) - hosted == 2 * 2 * size
    begun[1].backward()
    assert torch.equal(gradient(), expected) and begun[0].grad is not None and torch.equal(begun[0].grad, expected)
    assert live_bytes(size) - hosted == 2 * 2 * size


def live_bytes(size: int) -> int:
    """Return the bytes of all storages of `size` bytes that a tensor refers to, wherever it is kept."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held for held in storages.values() if held == size)


def test_what_cannot_be_trained_so_is_refused(go: Go, deep: Path, monkeypatch: pytest.MonkeyPatch):
    room(monkeypatch, 160_000)
    made = go(base=deep, quantization=AUTO, gradient_checkpointing=2)
    assert made.code == protocol.BAD_INPUT and made.failure.param == "hyperparameters.gradient_checkpointing"
    room(monkeypatch, 10_000)
    made = go(base=deep, quantization=AUTO)
    assert made.code == protocol.BAD_INPUT and made.failure.code == "base_too_large"


def test_a_base_that_fits_stays_on_the_card(go: Go, deep: Path, monkeypatch: pytest.MonkeyPatch):
    for size in (None, 10_000_000):
        room(monkeypatch, size)
        made = go(base=deep, quantization=AUTO, max_steps=1)
        assert made.code == protocol.DONE and not made.notes("base.offloaded") and "offload" not in made.result
    # Of what the job may take, 60 % are for weights.
    small = go(base=deep, quantization=AUTO, max_steps=1, max_memory_gib=160_000 / 0.6 / 2**30)
    assert small.result["offload"]["layers"] == 5
    room(monkeypatch, 160_000)
    assert not go(base=deep, max_steps=1).notes("base.offloaded"), "it was not asked for"
