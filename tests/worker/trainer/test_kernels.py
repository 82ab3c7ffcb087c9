"""The fast path is the same function as the plain one: gradients, losses, dropout, resume; and the gates can fail."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.schemas.lora import Lora
from tests.worker.trainer import eager, families, tiny
from tests.worker.trainer.conftest import attempt
from worker.ml.kernels import fused as fused_module
from worker.ml.kernels import torch_ops
from worker.ml.kernels.attention import Spans
from worker.ml.kernels.budget import Costs, bytes_of, layer_ways, plan_step
from worker.ml.kernels.cover import NotCovered, require_covered
from worker.ml.kernels.layer import Call, Recompute
from worker.ml.kernels.rows import FlatRows, MicroBatch, cut, group_rows
from worker.trainer import protocol

LENGTHS = [7, 12, 1, 5, 9]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYWHERE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXACT = {"bnb_4bit_compute_dtype": "float32"}


def lora(targets: list[str] | str = EVERYWHERE, **values: Any) -> Lora:
    return Lora(r=4, lora_alpha=8.0, target_modules=targets, **({"lora_dropout": 0.0} | values))


def data(model: Any) -> list[dict[str, list[int]]]:
    return eager.rows(LENGTHS, model.config.vocab_size)


@pytest.mark.parametrize("way", list(Recompute))
@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("targets", [ATTENTION, ["q_proj", "v_proj"], EVERYWHERE, ["down_proj"]])
def test_gradients_are_those_of_eager_layers(base: Path, targets: list[str], four_bit: bool, way: Recompute):
    model = eager.adapted(base, lora(targets), four_bit=four_bit)
    loss, wanted = eager.eager(model, data(model))
    found, ours = eager.fused(eager.path_of(model, way), model, data(model))
    assert found == pytest.approx(loss, rel=1e-6)
    assert eager.worst_error(ours, wanted) < 1e-5


def test_gradients_of_a_base_with_biases(tmp_path: Path):
    base = tiny.build_base(tmp_path / "base", attention_bias=True, mlp_bias=True)
    model = eager.adapted(base, lora(), four_bit=False)
    # Not any draw: rounding alone is between 2e-6 and 1.1e-5 of the gradients, depending on the biases.
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.1)
    _, wanted = eager.eager(model, data(model))
    assert eager.worst_error(eager.fused(eager.path_of(model), model, data(model))[1], wanted) < 1e-5


# The linear layers with one input, whose masks differ by their place.
SPLIT = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
JOINED = [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]


@pytest.mark.parametrize("way", list(Recompute))
@pytest.mark.parametrize(("family", "names"), [("llama", SPLIT), ("qwen3", SPLIT), ("phi3", JOINED)])
def test_dropout_is_the_mask_of_its_seed_also_when_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, names: list[list[str]], way: Recompute
):
    share = 0.4
    model = families.adapted(tmp_path, family, lora("all-linear", lora_dropout=share), four_bit=False)
    calls: list[Call] = []
    run = fused_module.run_layer
    monkeypatch.setattr(fused_module, "run_layer", lambda call, x: calls.append(call) or run(call, x))
    _, ours = eager.fused(eager.path_of(model, way), model, data(model))
    assert len({call.seed for call in calls}) == len(calls) == 2
    masks = {}
    for index, call in enumerate(calls):
        layer = f"model.layers.{index}"
        for group, members in enumerate(names):
            for place, name in enumerate(members):
                where = f"{layer}.{'self_attn' if group < 2 else 'mlp'}.{name}"
                width = model.get_base_model().get_submodule(where).in_features
                masks[where] = torch_ops.kept(
                    call.seed_of(group), place, sum(LENGTHS), width, share, torch.device("cpu")
                )
    for where, mask in masks.items():
        model.get_base_model().get_submodule(where).lora_dropout["default"] = _Given(mask, share)
    _, wanted = eager.eager(model, data(model))
    assert eager.worst_error(ours, wanted) < 1e-5


class _Given(torch.nn.Module):
    # Dropout by a given mask [tokens of all rows, width]; the rows come one after the other.
    def __init__(self, mask: torch.Tensor, share: float):
        super().__init__()
        self._mask, self._share, self._at = mask, share, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = self._mask[self._at : self._at + x.shape[1]]
        self._at += x.shape[1]
        return x * part / (1 - self._share)


def test_dropout_drops_its_share_and_its_masks_differ():
    masks = [torch_ops.kept(seed, i, 300, 400, 0.05, torch.device("cpu")) for seed in (1, 2, 9) for i in range(3)]
    flat = torch.stack(masks).flatten(1).float()
    assert (flat.mean(1) - 0.95).abs().max() < 0.003
    assert (torch.corrcoef(flat) - torch.eye(9)).abs().max() < 0.02


def test_cutting_a_step_changes_nothing(base: Path):
    model = eager.adapted(base, lora(), four_bit=True)
    path = eager.path_of(model)
    whole = eager.fused(path, model, data(model))
    path.costs = replace(costs(least_tokens=0, pass_tokens=0), layers=2, kept=dict.fromkeys(Recompute, 1))
    path.room = 2 * max(LENGTHS)
    assert len(path.plan(LENGTHS).sizes) > 2
    in_parts = eager.fused(path, model, data(model))
    assert in_parts[0] == pytest.approx(whole[0], rel=1e-6) and eager.worst_error(in_parts[1], whole[1]) < 1e-5


def see_each_other(micro: MicroBatch) -> MicroBatch:
    starts, end = micro.spans.starts, micro.num_tokens
    return replace(micro, spans=Spans(torch.stack([starts[0], starts[-1]]), (0, end), end))


def shifted(micro: MicroBatch) -> MicroBatch:
    return replace(micro, targets=micro.targets.roll(1))


def test_the_reference_of_the_card_is_the_same_model(base: Path):
    model = eager.adapted(base, lora(), four_bit=True)
    loss, wanted = eager.eager(eager.reference(model, lora()), data(model))
    found, ours = eager.fused(eager.path_of(model), model, data(model))
    assert found == pytest.approx(loss, rel=1e-6) and eager.worst_error(ours, wanted) < 1e-5


@pytest.mark.parametrize("alter", [see_each_other, shifted])
def test_the_gate_fails_for_a_broken_batch(base: Path, alter: Any):
    # The losses of random weights hardly differ; the gradients do.
    model = eager.adapted(base, lora(), four_bit=True)
    _, wanted = eager.eager(model, data(model))
    _, broken = eager.fused(eager.path_of(model), model, data(model), alter)
    assert eager.worst_cosine(broken, wanted) < 0.9 and eager.worst_error(broken, wanted) > 0.1


def test_the_gate_fails_for_a_dropped_scale(base: Path):
    model = eager.adapted(base, lora(), four_bit=True)
    _, wanted = eager.eager(model, data(model))
    path = eager.path_of(model)
    for group in (group for parts in path.layers for group in parts.groups):
        group.adapters = [replace(item, scale=1.0) for item in group.adapters]
    assert eager.worst_error(eager.fused(path, model, data(model))[1], wanted) > 0.1


def test_evaluation_and_generation_stay_plain(base: Path):
    model = eager.adapted(base, lora(), four_bit=False).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        before = model(input_ids=tokens, attention_mask=mask).logits
        path = eager.path_of(model)
        assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, before)
        path.restore()
        assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, before)


def test_rows_lie_end_to_end_and_predict_no_first_token():
    made = FlatRows()([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
    assert made["input_ids"].tolist() == [[1, 2, 3, 4, 5]] and made["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert made["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert made["trained"].tolist() == [0, 1, 3] and made["targets"].tolist() == [2, 3, 5]
    assert made["bounds"] == (0, 3, 5) and made["trained_bounds"] == (0, 2, 3)


def test_packed_rows_are_taken_apart():
    made = FlatRows()([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [3, 1]}])
    assert made["bounds"] == (0, 3, 4) and made["trained"].tolist() == [0, 1]


def test_micro_batches_hold_their_own_rows():
    rows = eager.rows([4, 2, 6], 50)
    parts = list(cut(FlatRows()(rows), [1, 2]))
    whole = [row["input_ids"] for row in rows]
    assert [part.tokens.tolist()[0] for part in parts] == [whole[0], [*whole[1], *whole[2]]]
    assert [part.spans.bounds for part in parts] == [(0, 4), (0, 2, 8)] and [p.spans.longest for p in parts] == [4, 6]
    for part in parts:
        assert part.targets.tolist() == part.tokens[0, part.trained + 1].tolist()
        assert part.spans.starts.tolist() == list(part.spans.bounds)


def test_micro_batches_are_few_and_even():
    assert group_rows([5, 5, 5, 5], 20) == [4]
    assert group_rows([5, 5, 5, 5], 19) == [2, 2]
    assert group_rows([30, 5, 5], 10) == [1, 2]


def costs(**values: int) -> Costs:
    kept = {Recompute.NOTHING: 100, Recompute.MLP: 40, Recompute.ALL: 10}
    return Costs(layers=4, kept=kept, **({"working": 0, "fixed": 0} | values))


def test_no_more_is_recomputed_than_memory_requires():
    none = (Recompute.NOTHING,) * 4
    assert layer_ways(10, costs(), 4000, none) == none
    ways = layer_ways(10, costs(), 3500, none)
    assert ways == (Recompute.MLP, *none[1:]) and bytes_of(10, ways, costs()) <= 3500
    least = (Recompute.ALL,) * 4
    assert layer_ways(10, costs(), 10**9, least) == least


def test_a_step_is_cut_where_that_costs_less_than_recomputing():
    lengths, none = [5000] * 4, (Recompute.NOTHING,) * 4
    assert plan_step(lengths, costs(), 20_000 * 400, none).sizes == [4]
    cut_up = plan_step(lengths, costs(), 10_000 * 400, none)
    assert cut_up.sizes == [2, 2] and cut_up.ways == [none, none]
    tight = plan_step([100] * 4, costs(), 390 * 400, none)
    assert tight.sizes == [4] and tight.ways[0].count(Recompute.MLP) == 1


def run(folder: Path, base: Path, **options: Any) -> Any:
    folder.mkdir()
    job = {name: options.pop(name) for name in ("lora", "quantization", "method", "resume_from") if name in options}
    tiny.write_run(folder, base, hyperparameters=options, validation=tiny.chat_rows(5), **job)
    return attempt(folder)


@pytest.mark.parametrize("packing", [False, True])
def test_a_job_trains_the_same_adapter_by_either_path(tmp_path: Path, base: Path, packing: bool):
    options = {"lora": {"lora_dropout": 0.0}, "quantization": EXACT, "max_steps": 4, "packing": packing}
    plain = run(tmp_path / "plain", base, kernels="plain", **options)
    made = run(tmp_path / "fused", base, kernels="fused", **options)
    assert made.code == plain.code == protocol.DONE
    assert made.losses == pytest.approx(plain.losses, rel=1e-5)
    assert made.metrics("eval")[-1]["loss"] == pytest.approx(plain.metrics("eval")[-1]["loss"], rel=1e-5)
    assert made.result["tokens_trained"] == plain.result["tokens_trained"]
    ours, theirs = made.weights(), plain.weights()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-4
    assert made.result["kernels"]["path"] == "fused" and len(made.notes("kernels.fused")) == 1
    assert made.result["checkpointed_layers"] == 2


# After the second step, and at the end of the first epoch.
@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_on_the_fast_path_is_bit_for_bit(tmp_path: Path, base: Path, step: int):
    options = {"lora": {"lora_dropout": 0.3}, "max_steps": 6, "save_steps": step, "kernels": "fused"}
    whole = run(tmp_path / "whole", base, **options)
    (tmp_path / "again").mkdir()
    shutil.copytree(whole.folder / "checkpoints" / f"step-{step:08d}", tmp_path / "again" / "resume")
    job = {"lora": options.pop("lora")}
    tiny.write_run(tmp_path / "again", base, hyperparameters=options, validation=tiny.chat_rows(5),
                   resume_from="resume", **job)  # fmt: skip
    again = attempt(tmp_path / "again")
    assert again.code == protocol.DONE and again.adapter_bytes() == whole.adapter_bytes()


def test_without_a_card_the_plain_path_runs_and_says_so_once(tmp_path: Path, base: Path):
    made = run(tmp_path / "run", base, max_steps=1)
    (note,) = made.notes("kernels.plain")
    assert "CUDA" in note.message and made.result["kernels"]["path"] == "plain" and not made.notes("kernels.fused")
    (note,) = run(tmp_path / "plain", base, max_steps=1, kernels="plain").notes("kernels.plain")
    assert note.data == {"reason": "it was asked for"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora": {"use_dora": True}}, "more than a pair"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "head"),
        ({"neftune_noise_alpha": 5.0}, "NEFTune"),
        ({"method": "full"}, "the base itself"),
    ],
)
def test_what_is_not_covered_stays_plain_and_says_why(tmp_path: Path, base: Path, options: dict[str, Any], reason: str):
    made = run(tmp_path / "run", base, kernels="fused", max_steps=1, **options)
    assert made.code == protocol.DONE
    (note,) = made.notes("kernels.plain")
    assert reason in note.message and note.level == "warning"


def test_another_family_is_not_covered(tmp_path: Path):
    base = tiny.build_family(tmp_path / "gpt2", "gpt2", n_embd=32, n_layer=2, n_head=2)
    model = eager.adapted(base, lora(["c_attn"]), four_bit=False)
    with pytest.raises(NotCovered, match="its layers are"):
        require_covered(model, torch.float32, 1)
