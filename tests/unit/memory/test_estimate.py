"""The estimate against peaks that were measured on cards, and what must follow from what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.shapes import LLAMA3_8B
from common.memory.estimate import Batch, estimate
from common.memory.fitting import BatchPlan, batch_of, read_rows
from common.memory.setup import Setup, read_setup
from common.memory.shape import Shape, read_shape
from common.schemas.hyperparameters import Hyperparameters
from common.schemas.jobs import JobSpec

# The longest micro-batch of the recipe's rows: 4 rows of 948 tokens; packed ones are full.
LONGEST = 948
GIB = 2**30


def shape_8b() -> Shape:
    found = read_shape(LLAMA3_8B | {"model_type": "llama"})
    assert found is not None
    return found


def setup_of(shape: Shape | None = None, **job: Any) -> Setup:
    return read_setup(JobSpec.model_validate({"model": "base", "dataset": "dataset:ds_0"} | job), shape or shape_8b())


PLAIN = {"hyperparameters": {"optim": "adamw_torch_fused"}}
# The classic comparison on the plain path, on one NVIDIA H200, 2026-11-24: bytes that were reserved at the peak.
MEASURED = {
    "LoRA, 16 bit": 42_242_932_736,
    "QLoRA": 32_113_688_576,
    "QLoRA + gradient checkpointing": 8_642_363_392,
    "packing": 8_520_728_576,
}
# A full fine-tune stopped at the card's end.
CARD_GIB = 139.8
ROWS = {
    "LoRA, 16 bit": ({"method": "lora"} | PLAIN, Batch(4, LONGEST, 0)),
    "QLoRA": ({}, Batch(4, LONGEST, 0)),
    "QLoRA + gradient checkpointing": ({}, Batch(4, LONGEST, 32)),
    "packing": ({}, Batch(4, 1024, 32, packed=True, equal=True)),
}


@pytest.mark.parametrize("name", ROWS)
def test_it_is_within_three_percent_of_the_measured_peak(name: str):
    job, batch = ROWS[name]
    found = estimate(setup_of(**job), batch)
    assert found.allocated_bytes == pytest.approx(MEASURED[name], rel=0.03)


def test_rows_of_one_length_leave_no_holes_in_the_allocator():
    """What an H100 reserved on the plain path, 2026-11-26: 8 rows of 901 tokens, every layer recomputed."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 400}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    shape = read_shape(sizes | heads | {"model_type": "llama"})
    assert shape is not None
    plain = setup_of(shape, hyperparameters={"kernels": "plain"})
    asked, plan = Hyperparameters(), BatchPlan(8, 1, 1)
    equal = read_rows(asked, longest=901, mean=901.0, max_length=2048)
    assert estimate(plain, batch_of(plan, plain, equal)).allocated_bytes == pytest.approx(746_586_112, rel=0.05)
    # Rows that are cut are as long as each other, and one that is shorter is enough to vary.
    assert read_rows(asked, longest=5000, mean=2048.0, max_length=2048).equal
    assert not read_rows(asked, longest=901, mean=900.9, max_length=2048).equal
    assert not read_rows(asked, longest=5000, mean=2047.0, max_length=2048).equal


def test_a_full_fine_tune_that_did_not_fit_is_one_that_does_not_fit():
    found = estimate(setup_of(method="full", **PLAIN), Batch(4, LONGEST, 0))
    assert found.allocated_bytes > CARD_GIB * GIB


# On an H200: packed rows, attention that needs no mask.
@pytest.mark.parametrize(
    ("batch", "low", "high"),
    [
        (Batch(1, 8192, 32, packed=True, varlen=True), 10.3, 11.8),
        (Batch(1, 16_384, 32, packed=True, varlen=True), 16.8, 17.1),
        (Batch(1, 8192, 0, packed=True, varlen=True), 52.5, 52.5),
    ],
)
def test_long_packed_rows_are_within_five_percent(batch: Batch, low: float, high: float):
    found = estimate(setup_of(), batch).allocated_bytes / GIB
    assert low * 0.95 <= found <= high * 1.05


def test_the_weights_of_four_bits_are_what_the_paper_says():
    shape = shape_8b()
    assert shape.linear_weights == 6_979_321_856 and shape.weights == 8_030_261_248
    in_4_bit = estimate(setup_of(), Batch(1, 8, 32)).parts["weights"] - 2 * shape.other_weights
    assert 8 * in_4_bit / shape.linear_weights == pytest.approx(4.127, abs=1e-3)
    single = setup_of(quantization={"bnb_4bit_use_double_quant": False})
    assert 8 * (single.weight_bytes - 2 * shape.other_weights) / shape.linear_weights == pytest.approx(4.5, abs=1e-3)


def test_the_adapter_is_counted_as_peft_counts_it():
    assert setup_of().trained_parameters == 13_631_488
    assert setup_of(lora={"r": 8, "target_modules": "all-linear"}).trained_parameters == 20_971_520
    first_two = {"r": 16, "target_modules": r"model\.layers\.[01]\.self_attn\.(q|k|v|o)_proj"}
    assert setup_of(lora=first_two).trained_parameters * 16 == 13_631_488
    whole = setup_of(method="lora", lora={"modules_to_save": ["lm_head"]})
    assert whole.trained_parameters == 13_631_488 + 128_256 * 4096


@pytest.mark.parametrize(
    ("optim", "values"),
    [("adamw_8bit", 2), ("adamw_torch_fused", 4), ("paged_adamw_32bit", 8), ("lion_8bit", 1), ("ademamix_8bit", 3)],
)
def test_the_optimizer_state_follows_its_name(optim: str, values: int):
    # Rank 16: no tensor is large enough to be paged.
    setup = setup_of(hyperparameters={"optim": optim})
    assert (setup.optimizer_bytes, setup.paged_bytes) == (values * setup.trained_parameters, 0)


def test_only_large_tensors_are_paged():
    setup = setup_of(hyperparameters={"optim": "paged_adamw_32bit"}, lora={"r": 64, "target_modules": ["k_proj"]})
    # r x 4096 is paged, 1024 x r is not.
    assert setup.paged_bytes == 32 * 64 * 4096 * 8 and setup.optimizer_bytes == 32 * 64 * 1024 * 8


def total(batch: Batch, **job: Any) -> int:
    return estimate(setup_of(**job), batch).total_bytes


def test_more_of_anything_takes_more():
    batch = Batch(4, 512, 8)
    ladder = [replace(batch, rows=rows) for rows in (1, 2, 4, 8)]
    assert sorted({total(step) for step in ladder}) == [total(step) for step in ladder]
    ladder = [replace(batch, length=length) for length in (64, 512, 1024)]
    assert sorted({total(step) for step in ladder}) == [total(step) for step in ladder]
    # But the first recomputed layer costs what it brings back.
    ladder = [replace(batch, checkpointed=count) for count in (32, 16, 8, 2, 0)]
    assert sorted({total(step) for step in ladder}) == [total(step) for step in ladder]
    assert total(batch) < total(batch, lora={"r": 64}) < total(batch, lora={"r": 64, "target_modules": "all-linear"})
    assert total(batch) < total(batch, method="lora") < total(batch, method="full")
    assert total(batch) > total(batch, lora={"lora_dropout": 0.0})
    assert total(batch) < total(batch, quantization={"bnb_4bit_use_double_quant": False})
    assert total(batch) < total(batch, quantization={"prepare_kbit_training": True})
    assert total(replace(batch, varlen=True)) < total(batch)
    assert total(replace(batch, fused=True)) < total(batch)


def test_layers_that_may_wait_leave_the_card():
    setup = setup_of(quantization={"device_map": "auto"})
    whole, squeezed = (estimate(setup, Batch(1, 64, 32), room=room).parts["weights"] for room in (None, 3 * GIB))
    assert squeezed == 3 * GIB < whole
    least = estimate(setup, Batch(1, 64, 32), room=0).parts["weights"]
    # Embeddings, head and two layers stay.
    assert 2 * setup.shape.other_weights < least < 2.5 * GIB


def test_a_shape_without_a_size_is_none():
    assert read_shape({"model_type": "llama", "hidden_size": 64}) is None
