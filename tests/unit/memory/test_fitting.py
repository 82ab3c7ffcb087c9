"""What "auto" chooses for a card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from common.memory.fitting import USABLE, BatchPlan, Fit, Rows, Wish, checkpointed, choose, read_wish
from common.memory.setup import Setup
from common.schemas.hyperparameters import Hyperparameters
from tests.unit.memory.test_estimate import GIB, setup_of

OPEN = Wish(None, None, None)
PLAIN = setup_of(hyperparameters={"kernels": "plain"})
ROWS = Rows(longest=1024, mean=300.0)


def chosen(free_gib: float, wish: Wish = OPEN, rows: Rows = ROWS, device: str = "cuda") -> Fit:
    return choose(wish, PLAIN, rows, int(free_gib * GIB), device=device)


@pytest.mark.parametrize("free_gib", [8, 10, 12, 16, 24, 40, 48, 80, 140])
def test_what_is_chosen_fits_and_keeps_sixteen_rows(free_gib: float):
    fit = chosen(free_gib)
    assert fit.fits and fit.estimate.allocated_bytes <= free_gib * GIB * USABLE
    assert fit.plan.micro_batch * fit.plan.accumulation == 16


def test_a_larger_card_recomputes_less():
    recomputed = [checkpointed(32, chosen(free).plan.checkpointing) for free in (8, 16, 24, 48, 140)]
    assert recomputed == sorted(recomputed, reverse=True) and recomputed[0] == 32 and recomputed[-1] == 0


def test_no_more_layers_are_recomputed_than_memory_requires():
    for free in (16, 24, 48):
        plan = chosen(free).plan
        fewer = [
            every for every in range(32, 0, -1) if 0 < checkpointed(32, every) < checkpointed(32, plan.checkpointing)
        ]
        for every in [0, *fewer]:
            assert not chosen(free, Wish(plan.micro_batch, plan.accumulation, every)).fits


def test_a_large_card_takes_the_largest_micro_batch():
    assert chosen(140).plan == BatchPlan(16, 1, 0)


def test_what_is_asked_is_kept():
    assert chosen(80, Wish(2, None, None)).plan.accumulation == 8
    assert chosen(80, Wish(3, None, 1)).plan == BatchPlan(3, 5, 1)
    plan = chosen(12, Wish(None, 8, None)).plan
    assert plan.accumulation == 8 and plan.micro_batch in (1, 2)
    assert chosen(8, Wish(32, 1, 0)).plan == BatchPlan(32, 1, 0)


def test_no_more_is_planned_with_than_the_job_may_take():
    asked = Hyperparameters(
        per_device_train_batch_size="auto", gradient_accumulation_steps="auto", gradient_checkpointing="auto",
        max_memory_gib=12.0,
    )  # fmt: skip
    assert chosen(80, read_wish(asked)) == chosen(12) != chosen(80)
    assert chosen(10, read_wish(asked)) == chosen(10)


def test_where_nothing_fits_the_smallest_is_taken():
    fit = chosen(4)
    assert not fit.fits and fit.plan == BatchPlan(1, 16, 1)


def test_layers_that_wait_in_host_memory_are_all_recomputed():
    setup = setup_of(quantization={"device_map": "auto"})
    assert choose(OPEN, setup, ROWS, 5 * GIB).plan.checkpointing == 1


def test_a_cpu_takes_four_rows_and_recomputes_nothing():
    assert chosen(140, device="cpu").plan == BatchPlan(4, 4, 0)


def test_equal_cards_choose_alike():
    assert len({chosen(24).plan for _ in range(3)}) == 1


FAST = setup_of(hyperparameters={"gradient_checkpointing": "auto"})


def cut(free_gib: float, wish: Wish = OPEN, setup: Setup = FAST) -> Fit:
    return choose(wish, setup, ROWS, int(free_gib * GIB))


def test_the_fast_path_cuts_a_step_to_what_there_is():
    made = [cut(free) for free in (8, 10, 12, 16, 24, 40)]
    assert all(fit.fits and fit.cut for fit in made)
    for free, fit in zip((8, 10, 12, 16, 24, 40), made, strict=True):
        assert fit.estimate.allocated_bytes <= free * GIB
    pieces = [fit.cut.tokens for fit in made if fit.cut]
    assert pieces == sorted(pieces) and pieces[0] < pieces[-1] == 16 * 1024
    recomputed = [fit.cut.all for fit in made if fit.cut and fit.cut.tokens == 16 * 1024]
    assert recomputed == sorted(recomputed, reverse=True) and recomputed[0] > recomputed[-1]
    assert not cut(5).fits


def test_a_large_card_holds_the_base_in_16_bit_too():
    small, large = (cut(free).estimate.parts["weights_16_bit"] for free in (24, 80))
    assert (small, large) == (0, 2 * FAST.shape.linear_weights)


def test_every_layer_recomputes_where_that_is_asked():
    assert all(fit.cut and fit.cut.all == 32 for fit in (cut(24, Wish(4, 4, 1)), cut(140, Wish(4, 4, 1))))


def test_rows_that_are_longer_than_attention_sees_take_the_other_path():
    within, beyond = (replace(FAST, shape=replace(FAST.shape, fusable_length=most)) for most in (1024, 1023))
    assert cut(140, setup=within) == cut(140)
    assert cut(140, setup=beyond).cut is None


@pytest.mark.parametrize(
    "job",
    [
        {"hyperparameters": {"kernels": "plain"}},
        {"hyperparameters": {"neftune_noise_alpha": 5.0}},
        {"method": "full"},
        {"lora": {"use_dora": True}},
        {"quantization": {"bnb_4bit_compute_dtype": "float16"}},
    ],
)
def test_what_the_fast_path_does_not_cover_takes_the_other(job: dict[str, Any]):
    assert cut(140).cut is not None
    assert cut(140, setup=setup_of(**job)).cut is None
