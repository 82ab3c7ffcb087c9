"""Keeps tokenised rows in an Arrow file, and hands that to the trainer without holding it in memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from worker.ml.render import Example

if TYPE_CHECKING:
    from datasets import Dataset

_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_BATCH = 512


def write_tokens(examples: Iterable[Example], path: Path) -> None:
    """Write examples to `path` as an Arrow stream with the columns `input_ids` and `labels`."""
    stream = iter(examples)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        while batch := list(islice(stream, _BATCH)):
            columns = [
                pa.array([getattr(item, name) for item in batch], _SCHEMA.field(name).type) for name in _SCHEMA.names
            ]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))


def load_tokens(path: Path) -> Dataset:
    """Return the dataset in `path`, mapped from disk."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def pack_tokens(rows: Dataset, strategy: str, max_length: int, seed: int) -> Dataset:
    """Return `rows` packed into sequences of `max_length` tokens.

    Args:
        strategy: `bfd` puts whole rows together that do not see each other; `wrapped` strings all rows on one thread,
            in an order drawn from `seed`, and cuts it.
    """
    from trl import pack_dataset

    return pack_dataset(rows.shuffle(seed) if strategy == "wrapped" else rows, max_length, strategy)


def sequence_lengths(dataset: Dataset) -> list[int]:
    """Return the number of tokens of each sequence, without decoding the tokens."""
    lengths: list[int] = []
    for table in dataset.with_format("arrow").iter(batch_size=4096):
        lengths.extend(pc.list_value_length(table.column("input_ids")).to_pylist())
    return lengths
