"""What was measured, as a table: the result file that OpenAI's clients download, and spreadsheets open."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# OpenAI's names first. The whole validation file is evaluated each time, so its loss is the full one.
_TRAIN = {"loss": "train_loss", "mean_token_accuracy": "train_accuracy"}
_EVAL = {"loss": "valid_loss", "mean_token_accuracy": "valid_mean_token_accuracy"}
_ALSO = ("epoch", "learning_rate", "grad_norm")
COLUMNS = ("step", *_TRAIN.values(), *_EVAL.values(), *_ALSO)


def write_results(path: Path, metrics: Iterable[Mapping[str, Any]]) -> None:
    """Write one row for each step at which something was logged; what was not measured there is empty.

    Args:
        metrics: entries with `step`, `kind` (train or eval) and values by name, as the run has collected them.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in metrics:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        names = _TRAIN | {name: name for name in _ALSO} if entry["kind"] == "train" else _EVAL
        row |= {column: entry[name] for name, column in names.items() if name in entry}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
