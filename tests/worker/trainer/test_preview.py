"""The preview child shows the very tokens and labels that training sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.errors import InvalidInput
from common.schemas import previews
from tests.hostile.checking import run_child
from tests.worker.trainer import tiny
from worker.trainer import preview as child
from worker.trainer.preview import preview
from worker.trainer.protocol import TrainSpec

ODD = {"messages": [{"role": "user", "content": "naïve 東京 🦊?"}, {"role": "assistant", "content": " the “sea”\n"}]}


def shown(
    folder: Path, base: Path, rows: list[Any], num_rows: int = 5, offset: int = 0, **options: Any
) -> dict[str, Any]:
    spec = tiny.write_run(folder, base, rows, hyperparameters=options)
    return preview(folder, spec, num_rows, offset)


def text(row: dict[str, Any], *, trained: bool | None = None) -> str:
    return "".join(token["text"] for token in row["tokens"] if trained in (None, token["trained"]))


def test_tokens_make_the_text_and_the_answer_is_marked(tmp_path: Path, base: Path):
    found = shown(tmp_path, base, [*tiny.chat_rows(3), ODD], max_length=200)
    assert [row["row"] for row in found["rows"]] == [1, 2, 3, 4] and not found["has_more"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row, given in zip(found["rows"], [*tiny.chat_rows(3), ODD], strict=True):
        assert text(row) == tokenizer.apply_chat_template(given["messages"], tokenize=False)
        assert text(row, trained=True) == given["messages"][1]["content"] + "<|im_end|>"
        assert [token["id"] for token in row["tokens"]] == tokenizer.apply_chat_template(given["messages"])["input_ids"]
        assert row["num_trained"] == sum(token["trained"] for token in row["tokens"]) and row["loss"] == "assistant"
    assert found["base_revision"] == "0123abc" and found["template"] == "base" and found["max_length"] == 200


def test_rows_are_chosen_and_bad_ones_are_told(tmp_path: Path, base: Path):
    rows = [*tiny.chat_rows(2), {"messages": []}, *tiny.chat_rows(4)]
    found = shown(tmp_path, base, rows, num_rows=2, offset=1)
    assert [row["row"] for row in found["rows"]] == [2, 4] and found["has_more"]
    assert len(found["problems"]) == 1 and found["problems"][0].startswith("dataset: row 3: messages is an empty array")


def test_options_count(tmp_path: Path, base: Path):
    cut = shown(tmp_path, base, tiny.chat_rows(1), max_length=8)["rows"][0]
    assert cut["num_cut"] > 0 and len(cut["tokens"]) == cut["num_tokens"] == 8
    whole = shown(tmp_path, base, tiny.chat_rows(1), loss="all")["rows"][0]
    assert [token["trained"] for token in whole["tokens"]] == [False, *[True] * (whole["num_tokens"] - 1)]
    with pytest.raises(InvalidInput, match="max_length"):
        shown(tmp_path, base, tiny.chat_rows(1), max_length=512)


def test_what_is_shown_is_bounded(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(child, "TOKENS_MAX", 30)
    found = shown(tmp_path, base, tiny.chat_rows(9), num_rows=9, max_length=200)
    assert sum(len(row["tokens"]) for row in found["rows"]) == 30
    assert found["has_more"] and len(found["rows"]) < 9 and found["rows"][-1]["num_tokens"] > 0
    assert previews.ROWS_MAX == 20


def test_the_child_answers_within_bounds(tmp_path: Path, base: Path):
    spec = tiny.write_run(tmp_path, base)
    ended = run_child(tmp_path, "worker.trainer.preview", "2", "0", address_space_bytes=4 << 30)
    assert ended.code == 0, ended.log
    assert json.loads(json.dumps(ended.last.report)) == preview(tmp_path, TrainSpec.read(tmp_path), 2, 0)  # type: ignore[union-attr]
    assert spec.job_id and "torch" not in ended.log
