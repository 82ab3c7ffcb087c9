"""Splits a share off a file's rows for validation.

Which rows depends on the seed and on their content alone: a row that occurs twice is never on both sides, and the order
of the file decides nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import replace

import numpy

from common.errors import InvalidInput
from worker.data.formats import parse_rows
from worker.data.rows import Row
from worker.data.source import Problems, Source

_KEY_BYTES = 8


class Split:
    """Which rows are held out: those whose hash is at most `highest`."""

    def __init__(self, seed: int, highest: int):
        self._seed = seed
        self._highest = highest

    def holds_out(self, row: Row) -> bool:
        """Return whether `row` is for validation."""
        return row_key(row, self._seed) <= self._highest

    def trains_on(self, row: Row) -> bool:
        """Return whether `row` is for training."""
        return not self.holds_out(row)


def split_off(source: Source, share: float, seed: int) -> Split:
    """Return the split that holds out `share` of the rows of `source` (rounded, but at least one row).

    Rows that are wrong are passed over: whoever takes the rows says what is wrong with them.

    Raises:
        InvalidInput: nothing is left to train on, or the file cannot be read.
    """
    keys = array("Q", (row_key(row, seed) for row in parse_rows(source, Problems())))
    if not keys:
        return Split(seed, -1)
    wanted = max(1, round(len(keys) * share))
    ordered = numpy.frombuffer(keys, dtype=numpy.uint64)
    highest = int(numpy.partition(ordered, wanted - 1)[wanted - 1])
    if int(ordered.max()) <= highest:
        raise InvalidInput(
            f"validation_split: {len(keys):,} rows are too few, or too much alike, to split some off",
            code="nothing_to_train",
            param="validation_split",
            hint="add rows, or name a validation_dataset",
        )
    return Split(seed, highest)


def row_key(row: Row, seed: int) -> int:
    """Return a hash of the content of `row`, spread evenly over 64 bits."""
    content = repr(replace(row, number=0)).encode()
    digest = hashlib.blake2b(content, digest_size=_KEY_BYTES, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")
