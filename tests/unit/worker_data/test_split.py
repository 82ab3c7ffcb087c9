"""Rows that are held out: as many as asked, by seed and content alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import InvalidInput
from worker.data.formats import parse_rows
from worker.data.source import Source
from worker.data.split import split_off


def held_out(folder: Path, texts: list[str], share: float, seed: int = 42) -> set[str]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    split = split_off(Source(path), share, seed)
    rows = list(parse_rows(Source(path)))
    assert all(split.holds_out(row) != split.trains_on(row) for row in rows)
    return {row.text for row in rows if split.holds_out(row)}


TEXTS = [f"row {number}" for number in range(200)]


@pytest.mark.parametrize(("share", "count"), [(0.5, 100), (0.1, 20), (0.001, 1), (0.0125, 2)])
def test_the_share_is_exact(tmp_path: Path, share: float, count: int):
    assert len(held_out(tmp_path, TEXTS, share)) == count


def test_seed_and_content_decide_and_nothing_else(tmp_path: Path):
    first = held_out(tmp_path, TEXTS, 0.2)
    assert held_out(tmp_path, TEXTS[::-1], 0.2) == first
    assert held_out(tmp_path, TEXTS, 0.2, seed=7) != first
    assert held_out(tmp_path, TEXTS, 0.3) > first


def test_a_row_that_occurs_twice_is_on_one_side(tmp_path: Path):
    first = held_out(tmp_path, TEXTS, 0.2)
    assert held_out(tmp_path, TEXTS * 3, 0.2) == first


@pytest.mark.parametrize("texts", [["a"], ["a"] * 10])
def test_what_leaves_nothing_to_train_on_is_refused(tmp_path: Path, texts: list[str]):
    with pytest.raises(InvalidInput, match=r"validation_split: .* too few, or too much alike") as caught:
        held_out(tmp_path, texts, 0.5)
    assert caught.value.param == "validation_split" and "validation_dataset" in (caught.value.hint or "")


def test_bad_rows_are_passed_over(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{broken\n{"text": 1}\n{"text": "b"}\n')
    assert split_off(Source(path), 0.5, 42)
