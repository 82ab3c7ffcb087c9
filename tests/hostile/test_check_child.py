"""The worst files through the real check process, under a cap on its address space: what they cost is bounded."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import parquets, texts, turns
from tests.hostile.checking import Bad, Content, lay_out, run_child, told
from worker.trainer import protocol
from worker.trainer.protocol import Result

ADDRESS_SPACE_BYTES = 3 * 2**29
# The interpreter, pyarrow and the tokenizers alone take 115 MB.
RSS_BYTES = 512 * 2**20
# A token that is being made takes some 500 bytes: a megabyte of noise, half a gigabyte.
HEAVY_RSS_BYTES = 768 * 2**20
CPU_S = 20

WORST = {
    "a line of a gigabyte", "nesting by brackets", "a gzip bomb", "a million digits", "100,000 columns",
    "a row of many long fields", "an array of a gigabyte of nothing", "one value a million times",
    "one value for all rows at once", "a page of 60 MB", "50 million bits in a row", "50,000 turns",
    "deep arguments as text", "a role of a megabyte",
}  # fmt: skip
CASES = [bad for bad in (*texts.ALL, *parquets.ALL, *turns.ALL) if bad.name in WORST]


def test_every_worst_case_is_there():
    assert {bad.name for bad in CASES} == WORST


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in CASES])
def test_refused_at_a_bounded_price(tmp_path: Path, base: Path, bad: Bad):
    ended = run_child(
        lay_out(tmp_path, base, bad.file, bad.content, limits=bad.limits), address_space_bytes=ADDRESS_SPACE_BYTES
    )
    assert ended.code == protocol.BAD_INPUT, ended.log[-2000:]
    assert bad.says in told(ended.last).message
    assert ended.rss_bytes < RSS_BYTES and ended.cpu_s < CPU_S, (ended.rss_bytes >> 20, ended.cpu_s)


def write_rows(count: int, row: Any) -> Content:
    """Return a file of `count` times `row`."""
    line = json.dumps(row, ensure_ascii=False) + "\n"

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(line for _ in range(count))

    return write


def conversation(num_turns: int, contents: Iterable[str]) -> dict[str, Any]:
    """Return a row of so many turns."""
    roles = ("user", "assistant")
    turns_of = zip(range(num_turns), contents, strict=False)
    return {"messages": [{"role": roles[index % 2], "content": content} for index, content in turns_of]}


def noise(num_chars: int) -> str:
    """Return text that no vocabulary makes short."""
    return "".join(random.Random(0).choices(string.printable.strip() + "éß漢字", k=num_chars))


HEAVY = {
    "rows of a megabyte": write_rows(5, {"text": "the boats lie in the harbour " * 35_000}),
    "a row of noise": write_rows(1, {"text": noise(1_000_000)}),
    "a word of two megabytes": write_rows(1, {"text": "b" * 2_000_000}),
    "blanks of two megabytes": write_rows(1, {"text": " " * 2_000_000 + "x"}),
    "a thousand turns": write_rows(1, conversation(1000, ["the boats lie in the harbour"] * 1000)),
}


@pytest.mark.parametrize("content", HEAVY.values(), ids=HEAVY)
def test_what_is_heavy_and_allowed_is_bounded_too(tmp_path: Path, base: Path, content: Content):
    ended = run_child(lay_out(tmp_path, base, "a.jsonl", content), address_space_bytes=ADDRESS_SPACE_BYTES)
    assert ended.code == protocol.DONE, (ended.last, ended.log[-2000:])
    assert isinstance(ended.last, Result)
    assert ended.rss_bytes < HEAVY_RSS_BYTES and ended.cpu_s < CPU_S, (ended.rss_bytes >> 20, ended.cpu_s)
