"""The estimate of `common.memory` against models: their weights, and what autograd keeps of a small one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from common.memory import fused
from common.memory.estimate import Batch, layer_bytes_per_token
from common.memory.setup import Setup, read_setup
from common.memory.shape import Shape, read_shape
from common.schemas.jobs import JobSpec
from common.schemas.lora import Lora
from tests.worker.trainer import eager, families
from worker.ml.adapters import modules_of
from worker.ml.base_config import MODEL_TYPES
from worker.ml.kernels.cover import NotCovered, require_covered
from worker.ml.kernels.fused import Fused
from worker.ml.kernels.layer import Recompute
from worker.ml.towers import empty_model

SIZES = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROWS, LENGTH = 2, 128
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES.values()))
def test_the_weights_of_every_architecture_are_counted_from_its_configuration(model_type: str):
    config = AutoConfig.for_model(model_type)
    # transformers 5.23: the defaults of Ministral and Nemotron are not enough for their own classes.
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "num_key_value_heads", 0) is None:
        config.num_key_value_heads = config.num_attention_heads
    model = empty_model(config)
    shape = shape_of(config)
    linear = sum(model.get_submodule(name).weight.numel() for name in modules_of(model).linear)
    assert shape.linear_weights == linear
    # A vision tower is counted roughly.
    assert shape.weights == pytest.approx(model.num_parameters(), rel=0.01 if shape.outside else 0.001)


def shape_of(config: Any) -> Shape:
    found = read_shape(config.to_dict())
    assert found is not None
    return found


@pytest.mark.parametrize("targets", [ATTENTION, "all-linear"], ids=["attention", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_activations_are_what_autograd_keeps(model_type: str, method: str, dropout: float, targets: Any):
    lora = {"r": 8, "lora_dropout": dropout, "target_modules": targets}
    setup = read(model_type, method=method, lora=lora)
    counted = layer_bytes_per_token(setup, Batch(ROWS, LENGTH, 0))
    if dropout:
        # On the CPU dropout keeps its noise in the adapter's dtype, on a card one byte a value.
        counted += sum((setup.trained_bytes - 1) * linear.inputs for linear, _ in setup.adapted)
    assert counted == pytest.approx(kept_per_token(model_type, method, lora), rel=0.03)


def test_a_full_fine_tune_keeps_narrow_copies_of_its_weights_too():
    setup = read("llama", method="full")
    copies = setup.shape.linear_weights / setup.shape.layers * 2 / (ROWS * LENGTH)
    counted = layer_bytes_per_token(setup, Batch(ROWS, LENGTH, 0)) + copies
    assert counted == pytest.approx(kept_per_token("llama", "full", None), rel=0.03)


def read(model_type: str, **job: Any) -> Setup:
    spec = JobSpec.model_validate({"model": "base", "dataset": "dataset:ds_0"} | job)
    return read_setup(spec, shape_of(AutoConfig.for_model(model_type, num_hidden_layers=2, **SIZES)))


def kept_per_token(model_type: str, method: str, lora: dict[str, Any] | None) -> float:
    """Return the bytes that a layer keeps of a token: what four more layers add, over four."""
    two, six = (kept(model_type, method, lora, layers) for layers in (2, 6))
    return (six - two) / 4 / (ROWS * LENGTH)


def kept(model_type: str, method: str, lora: dict[str, Any] | None, layers: int) -> int:
    """Return the bytes of every tensor that autograd keeps of a forward pass through the layers."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=layers, **SIZES)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    base = base.float() if method == "full" else base.to(torch.bfloat16)
    base.config.use_cache = False
    model: torch.nn.Module = base
    if lora is not None:
        base.requires_grad_(False)
        base.enable_input_require_grads()
        model = get_peft_model(base, LoraConfig(**lora), autocast_adapter_dtype=method == "lora")
    model.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Held, so that no address is used twice.
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, -10:] = 0
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        output = base.model(input_ids=ids, attention_mask=mask)
    assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for where, tensor in found.items() if where not in own)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("targets", [["o_proj"], "all-linear"], ids=["one", "all"])
@pytest.mark.parametrize("name", families.COVERED)
def test_the_fast_path_plans_with_the_same_bytes(tmp_path: Path, name: str, targets: Any, fp8: bool):
    lora = {"r": 8, "target_modules": targets}
    model = eager.adapted(families.build(tmp_path, name), Lora(**lora), four_bit=True, dtype=torch.bfloat16)
    path = Fused(model, least=(Recompute.NOTHING,) * 2, room=None)
    if fp8:
        path.compute_narrow()
    job = {"model": "base", "dataset": "dataset:ds_0", "lora": lora, "hyperparameters": {"fp8": fp8}}
    spec = JobSpec.model_validate(job)
    foreseen = fused.costs(read_setup(spec, shape_of(model.config)))
    kept = path.costs.kept
    assert (kept[Recompute.NOTHING], kept[Recompute.MLP]) == (foreseen.nothing, foreseen.mlp)
    assert (kept[Recompute.ALL], path.costs.working, path.costs.fixed) == (
        foreseen.all,
        foreseen.working,
        foreseen.fixed,
    )


@pytest.mark.parametrize("name", families.COVERED)
def test_the_fast_path_is_foreseen_for_the_rows_that_it_takes(tmp_path: Path, name: str):
    model = eager.adapted(families.build(tmp_path, name), Lora(target_modules="all-linear"), four_bit=False)
    # What `config.json` says, where a library's default is left out of it.
    stored = json.loads((tmp_path / "base" / "config.json").read_text())
    shape = read_shape(stored)
    assert shape is not None and shape.fusable
    most = shape.fusable_length
    assert (most is None) == ("sliding_window" not in families.COVERED[name][1])
    require_covered(model, torch.float32, most or 256)
    if most is not None:
        with pytest.raises(NotCovered):
            require_covered(model, torch.float32, most + 1)


@pytest.mark.parametrize(
    ("model_type", "values", "most"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 512}, None),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True}, 512),
        ("phi3", {"sliding_window": 2047, "rope_scaling": {"type": "su"}}, 2047),
        ("phi3", {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 1024}, 1024),
        ("phi3", {"rope_scaling": {"type": "su"}}, 4096),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8192}}, None),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8192}}, 8192),
    ],
)
def test_the_longest_row_of_the_fast_path_is_read_from_a_configuration(
    model_type: str, values: dict[str, Any], most: int | None
):
    shape = read_shape(SIZES | {"num_hidden_layers": 2, "model_type": model_type} | values)
    assert shape is not None and shape.fusable_length == most


def test_a_backward_pass_of_wide_heads_is_counted(tmp_path: Path):
    # As in the smallest Qwen 3: heads are twice as wide as the hidden state, and attention holds more than the MLP.
    sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 8}
    model = eager.adapted(
        families.build(tmp_path, "qwen3", **sizes), Lora(target_modules="all-linear"), four_bit=True,
        dtype=torch.bfloat16,
    )  # fmt: skip
    path = Fused(model, least=(Recompute.NOTHING,) * 2, room=None)
    queries, keys = 8 * 32, 2 * 32
    assert path.costs.working == 2 * (64 + 4 * queries + 2 * keys + 2 * queries + queries + keys) > 2 * (192 + 8 * 64)
