"""The order of rows depends on seed and epoch alone, and groups rows of similar length."""

from __future__ import annotations

import random

import torch

from worker.ml.order import EpochOrder


def taken(order: EpochOrder, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


def test_each_epoch_has_its_own_order_whatever_was_drawn_before():
    first = [taken(EpochOrder(50, 42), epoch) for epoch in range(3)]
    torch.manual_seed(7)
    torch.rand(1000)
    assert [taken(EpochOrder(50, 42), epoch) for epoch in range(3)] == first
    assert len({tuple(order) for order in first}) == 3
    assert taken(EpochOrder(50, 43), 0) != first[0]
    assert all(sorted(order) == list(range(50)) for order in first)


def test_groups_hold_rows_of_similar_length():
    lengths = [random.Random(index).randint(1, 1000) for index in range(800)]

    def spread(order: list[int]) -> float:
        groups = [[lengths[index] for index in order[start : start + 8]] for start in range(0, 800, 8)]
        return sum(max(group) - min(group) for group in groups) / len(groups)

    grouped, plain = EpochOrder(800, 1, lengths, 8), EpochOrder(800, 1)
    assert len(grouped) == 800 and sorted(taken(grouped, 0)) == list(range(800))
    assert spread(taken(grouped, 0)) < spread(taken(plain, 0)) / 10
    assert lengths[taken(grouped, 0)[0]] == max(lengths)
    assert taken(grouped, 0) != taken(grouped, 1)
