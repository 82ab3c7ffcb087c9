"""Lays the rows of an optimizer step end to end, and cuts them into as few micro-batches as memory allows.

The rows of a step are those of the plain path, and its loss is the mean over all their trained tokens: how they are
cut changes the order of sums and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from worker.ml.kernels.attention import Spans
from worker.ml.render import NO_LOSS


@dataclass(frozen=True)
class MicroBatch:
    """Rows end to end: `tokens` and `positions` [1, tokens]; `trained` says where `targets` are predicted."""

    tokens: torch.Tensor
    positions: torch.Tensor
    trained: torch.Tensor
    targets: torch.Tensor
    spans: Spans

    @property
    def num_tokens(self) -> int:
        """The number of tokens, of which none is padding."""
        return self.spans.bounds[-1]


class FlatRows:
    """The collator: one batch for all rows of a step."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the rows end to end. A packed row comes with the lengths of what was packed."""
        tokens = torch.cat([torch.as_tensor(item["input_ids"], dtype=torch.long) for item in examples])
        labels = torch.cat([torch.as_tensor(item["labels"], dtype=torch.long) for item in examples])
        lengths = [size for item in examples for size in item.get("seq_lengths") or [len(item["input_ids"])]]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        # The first token of a row follows nothing.
        labels[bounds[:-1]] = NO_LOSS
        trained = (labels != NO_LOSS).nonzero()[:, 0]
        counts = torch.bucketize(bounds, trained).tolist()
        return {
            "input_ids": tokens[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(size) for size in lengths])[None],
            "trained": trained - 1,
            "targets": labels[trained],
            "starts": bounds.to(torch.int32),
            "bounds": tuple(bounds.tolist()),
            "trained_bounds": tuple(counts),
        }


def cut(batch: dict[str, Any], sizes: list[int]) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a batch; `sizes` are the rows in each."""
    bounds, trained_bounds = batch["bounds"], batch["trained_bounds"]
    first = 0
    for size in sizes:
        last = first + size
        begin, end = bounds[first], bounds[last]
        chosen = slice(trained_bounds[first], trained_bounds[last])
        inside = tuple(bound - begin for bound in bounds[first : last + 1])
        longest = max(after - before for before, after in pairwise(inside))
        yield MicroBatch(
            tokens=batch["input_ids"][:, begin:end],
            positions=batch["position_ids"][:, begin:end],
            trained=batch["trained"][chosen] - begin,
            targets=batch["targets"][chosen],
            spans=Spans(batch["starts"][first : last + 1] - begin, inside, longest),
        )
        first = last


def group_rows(lengths: list[int], most: int) -> list[int]:
    """Return how many rows go into each micro-batch, in order: as few micro-batches as `most` tokens allow, and even.

    A row that is longer than `most` has one of its own.
    """
    least = _group(lengths, most)
    low, high = max(lengths), max(most, max(lengths))
    # The smallest limit that needs no more micro-batches: none of them is then a remnant.
    while low < high:
        middle = (low + high) // 2
        if len(_group(lengths, middle)) <= len(least):
            high = middle
        else:
            low = middle + 1
    return _group(lengths, high)


def _group(lengths: list[int], most: int) -> list[int]:
    sizes: list[int] = []
    filled = most
    for length in lengths:
        if filled + length > most or not sizes:
            sizes.append(0)
            filled = 0
        sizes[-1] += 1
        filled += length
    return sizes
