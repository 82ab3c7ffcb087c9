"""Each family on the fast path is the same function as its own eager layers, and the gate fails where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.trainer import eager, families
from tests.worker.trainer.test_kernels import EXACT, LENGTHS, data, lora, run
from worker.ml.kernels.cover import NotCovered, require_covered
from worker.ml.kernels.layer import Recompute
from worker.trainer import protocol

FAR = max(LENGTHS)


@pytest.mark.parametrize("way", list(Recompute))
@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("name", families.NEW)
def test_gradients_are_those_of_the_family(tmp_path: Path, name: str, four_bit: bool, way: Recompute):
    model = families.adapted(tmp_path, name, lora("all-linear"), four_bit=four_bit)
    require_covered(model, torch.float32, FAR)
    loss, wanted = eager.eager(model, data(model))
    found, ours = eager.fused(eager.path_of(model, way), model, data(model))
    assert found == pytest.approx(loss, rel=1e-6)
    assert eager.worst_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("targets", [["qkv_proj"], ["gate_up_proj", "down_proj"], ["o_proj"]])
def test_gradients_of_some_fused_projections(tmp_path: Path, targets: list[str]):
    model = families.adapted(tmp_path, "phi3", lora(targets), four_bit=True)
    _, wanted = eager.eager(model, data(model))
    assert eager.worst_error(eager.fused(eager.path_of(model), model, data(model))[1], wanted) < 1e-5


# What a family has and Llama has not, taken away: the gradients have to tell.
BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "no norm of heads": ("qwen3", {"head_norm": None}),
    "norms of heads of ones": ("qwen3", {"head_norm": torch.ones(6, 32)}),
    "every layer turns": ("smollm3", {"turns": True}),
    "no layer turns": ("phi3, heads that turn in part", {"turns": False}),
    "whole branches": ("granite", {"branch": 1.0}),
    "another scale": ("granite", {"scale": 0.25}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_gate_fails_for_a_layer_of_another_family(tmp_path: Path, what: str):
    name, other = BROKEN[what]
    model = families.adapted(tmp_path, name, lora("all-linear"), four_bit=False)
    _, wanted = eager.eager(model, data(model))
    path = eager.path_of(model)
    for layer, parts in zip(path._patched, path.layers, strict=True):
        index, _, plain = layer.forward.args
        layer.forward = type(layer.forward)(path._forward, index, replace(parts, **other), plain)
    assert eager.worst_error(eager.fused(path, model, data(model))[1], wanted) > 0.01


def test_the_gate_fails_for_whole_logits(tmp_path: Path):
    model = families.adapted(tmp_path, "granite", lora("all-linear"), four_bit=False)
    loss, _ = eager.eager(model, data(model))
    path = eager.path_of(model)
    path._hidden_scale = 1.0
    assert eager.fused(path, model, data(model))[0] != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["mistral", "ministral", "phi3"])
def test_a_row_longer_than_the_window_stays_plain(tmp_path: Path, name: str):
    model = families.adapted(tmp_path, name, lora("all-linear"), four_bit=False, sliding_window=FAR - 4)
    with pytest.raises(NotCovered, match=f"sees {FAR - 4} tokens, and the longest row has {FAR}"):
        require_covered(model, torch.float32, FAR)
    # The reason is real: tokens that a row begins with are out of sight, and the gradients differ.
    _, wanted = eager.eager(model, data(model))
    assert eager.worst_error(eager.fused(eager.path_of(model), model, data(model))[1], wanted) > 1e-4


def test_rows_that_change_the_angles_of_others_stay_plain(tmp_path: Path):
    factors = [1.0 + index / 4 for index in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0,
            "short_factor": factors, "long_factor": [4 * value for value in factors]}  # fmt: skip
    options = {"rope_parameters": rope, "original_max_position_embeddings": FAR, "sliding_window": None}
    model = families.adapted(tmp_path, "phi3", lora("all-linear"), four_bit=False, **options)
    require_covered(model, torch.float32, FAR)
    _, wanted = eager.eager(model, data(model))
    assert eager.worst_error(eager.fused(eager.path_of(model), model, data(model))[1], wanted) < 1e-5
    with pytest.raises(NotCovered, match=f"a row of more than {FAR} tokens"):
        require_covered(model, torch.float32, FAR + 1)


@pytest.mark.parametrize(
    ("option", "reason"), [("attention_dropout", "drops attention"), ("resid_pdrop", "drops what its layers add")]
)
def test_a_family_with_dropout_of_its_own_stays_plain(tmp_path: Path, option: str, reason: str):
    model = families.adapted(tmp_path, "phi3", lora("all-linear"), four_bit=False, **{option: 0.1})
    with pytest.raises(NotCovered, match=reason):
        require_covered(model, torch.float32, FAR)


@pytest.mark.parametrize("name", ["qwen3", "phi3, heads that turn in part"])
def test_a_job_trains_the_same_adapter_by_either_path(tmp_path: Path, name: str):
    base = families.build(tmp_path, name)
    options = {"lora": {"lora_dropout": 0.0, "target_modules": "all-linear"}, "quantization": EXACT, "max_steps": 3}
    plain = run(tmp_path / "plain", base, kernels="plain", **options)
    made = run(tmp_path / "fused", base, kernels="fused", **options)
    assert made.code == plain.code == protocol.DONE
    assert made.losses == pytest.approx(plain.losses, rel=1e-5)
    ours, theirs = made.weights(), plain.weights()
    assert max(float((ours[where] - theirs[where]).abs().max()) for where in theirs) < 1e-4
    assert made.result["kernels"]["path"] == "fused"


def test_a_job_with_a_row_beyond_the_window_says_why_once(tmp_path: Path):
    base = families.build(tmp_path, "mistral", sliding_window=8)
    made = run(tmp_path / "run", base, kernels="fused", max_steps=1)
    (note,) = made.notes("kernels.plain")
    assert made.code == protocol.DONE and "sees 8 tokens, and the longest row has" in note.message
    assert not made.notes("kernels.fused")
