"""What `tunery show` says of a job's rows."""

from __future__ import annotations

from typing import Any

from common.cli.counted import counted

REPORT: dict[str, Any] = {
    "rows": 1200, "rows_dropped": 3, "rows_duplicate": 40, "rows_empty": 0, "turns": {"user": 1200, "assistant": 1203},
    "tokens": 50_000, "trained_tokens": 9000, "rows_cut": 12, "cut_share": 0.01, "max_length": 1024,
    "length_histogram": {"32": 100, "128": 1100},
}  # fmt: skip


def test_counts_are_told_in_words():
    assert counted(REPORT) == [
        ("rows", "1,200 · 3 left out: nothing to learn within max_length · 40 duplicates"),
        ("turns", "1,200 user · 1,203 assistant"),
        ("tokens", "50,000, 9,000 of them trained on · max_length 1,024 cuts 1.0% of the rows"),
        ("lengths", "▁ █ up to 32 … 128 tokens a row"),
    ]


def test_a_finished_job_tells_them_too():
    assert counted({"data": REPORT | {"rows_cut": 0}})[2][1] == "50,000, 9,000 of them trained on"


def test_nothing_is_said_before_the_check():
    assert counted(None) == counted({"merged": {}}) == []
