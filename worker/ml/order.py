"""The order of rows in each epoch, as a function of the seed and the epoch alone.

transformers draws the length-grouped order from the global random state, which a resumed run has used differently by
then: from the second epoch on it would see other batches than the run that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochOrder(Sampler[int]):
    """Yields row indices: shuffled, and where `lengths` is given, in groups of similar length.

    Args:
        lengths: tokens of each row, or None for a plain shuffle.
        group: rows that are drawn together (one optimizer step); the longest group comes first.
    """

    def __init__(self, num_rows: int, seed: int, lengths: list[int] | None = None, group: int = 1):
        self._num_rows = num_rows
        self._seed = seed
        self._lengths = lengths
        self._group = group
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields; accelerate's loader calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        if self._lengths is None:
            return iter(torch.randperm(self._num_rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self._lengths, self._group, generator=generator))
