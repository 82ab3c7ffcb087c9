"""A large file is counted by several processes at once, with the same result as by one."""

from __future__ import annotations

import csv
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hostile.checking import lay_out, run_child
from tests.worker.trainer import tiny
from worker.trainer import forks, gauge, protocol
from worker.trainer.check import answer
from worker.trainer.forks import spread
from worker.trainer.protocol import Checked, Failed, Message, Result, Sender, TrainSpec

# About a megabyte and a half: beyond what one process reads by itself.
ROWS = 4000
SPACE_BYTES = 6 << 30


def rows(bad: bool) -> list[dict[str, Any]]:
    made = []
    for number in range(ROWS):
        turns = [
            {"role": "user", "content": f"{number % 3900} {tiny.sentence(number, 30)}"},
            {"role": "assistant", "content": tiny.sentence(number, 3 + number % 40)},
        ]
        made.append({"messages": turns if not bad or number % 97 else turns[:1]})
    return made


def write_jsonl(path: Path, bad: bool) -> None:
    tiny.write_jsonl(path, rows(bad))


def write_array(path: Path, bad: bool) -> None:
    path.write_text(json.dumps(rows(bad)))


def write_parquet(path: Path, bad: bool) -> None:
    pq.write_table(pa.Table.from_pylist(rows(bad)), path, compression="none", use_dictionary=False)


def write_csv(path: Path, bad: bool) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["messages"])
        out.writerows([json.dumps(row["messages"])] for row in rows(bad))


def both(folder: Path) -> tuple[Message, Message]:
    """Return what one process says of the job in `folder`, and what the child says, with a process for each core."""
    said: list[Message] = []
    answer(folder, said.append)
    ended = run_child(folder, address_space_bytes=SPACE_BYTES)
    assert ended.last is not None, ended.log
    return said[-1], ended.last


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing is spread")
@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.json", write_array), ("a.csv", write_csv), ("a.parquet", write_parquet)],
)
def test_shares_add_up_to_the_whole(tmp_path: Path, base: Path, name: str, write: Callable[[Path, bool], None]):
    alone, together = both(lay_out(tmp_path, base, name, lambda path: write(path, False)))
    assert isinstance(alone, Result) and alone == together
    assert alone.report["rows"] == ROWS and alone.report["rows_duplicate"] == 0
    assert alone.report["turns"] == {"user": ROWS, "assistant": ROWS}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.json", write_array), ("a.csv", write_csv), ("a.parquet", write_parquet)],
)
def test_a_check_says_how_far_it_is(
    tmp_path: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path, bool], None],
    processes: int,
):
    monkeypatch.setattr(gauge, "EVERY_S", 0.0)
    folder = lay_out(tmp_path, base, name, lambda path: write(path, False))
    with (tmp_path / "said").open("ab") as said:  # where several processes may append
        assert answer(folder, Sender(said), processes) == protocol.DONE
    told = [protocol.decode(line) for line in (tmp_path / "said").read_bytes().splitlines()]
    far = [message for message in told if isinstance(message, Checked)]
    size = (folder / TrainSpec.read(folder).train_file).stat().st_size
    assert {(one.param, one.total_bytes) for one in far} == {("dataset", size)}
    assert [one.rows for one in far] == sorted(one.rows for one in far) and far[-1].rows >= ROWS
    assert [one.bytes for one in far] == sorted(one.bytes for one in far) and far[0].bytes < 0.9 * size < far[
        -1
    ].bytes <= size


def test_both_files_count_and_a_quick_check_says_nothing(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.write_run(tmp_path, base, tiny.chat_rows(5), validation=tiny.chat_rows(3))
    said: list[Message] = []
    assert answer(tmp_path, said.append) == protocol.DONE
    assert not [message for message in said if isinstance(message, Checked)], "no transaction for each small job"
    monkeypatch.setattr(gauge, "EVERY_S", 0.0)
    assert answer(tmp_path, said.append) == protocol.DONE
    far = [message for message in said if isinstance(message, Checked)]
    assert [(one.param, one.rows) for one in far] == [
        *(("dataset", row) for row in range(1, 6)), *(("validation_dataset", row) for row in range(1, 4))
    ]  # fmt: skip
    assert far[4].bytes < far[5].bytes < far[7].bytes == far[7].total_bytes


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing is spread")
@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_jsonl), ("a.parquet", write_parquet)])
def test_bad_rows_are_listed_in_the_order_of_the_file(
    tmp_path: Path, base: Path, name: str, write: Callable[[Path, bool], None]
):
    alone, together = both(lay_out(tmp_path, base, name, lambda path: write(path, True)))
    assert isinstance(alone, Failed) and alone == together
    assert alone.message.endswith("… and 22 more bad rows")
    assert [int(line.split("row ")[1].split(":")[0]) for line in alone.message.splitlines()[:-1]] == [
        number + 1 for number in range(0, 20 * 97, 97)
    ]


def test_duplicates_and_empty_texts_are_counted(tmp_path: Path, base: Path):
    rows = [*tiny.chat_rows(5), *tiny.chat_rows(3)]
    called = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    told = [{"role": "tool", "content": "sea"}, {"role": "assistant", "content": "the sea"}]
    rows.append({"messages": [rows[0]["messages"][0], called, *told]})
    tiny.write_run(tmp_path, base, rows)
    said: list[Message] = []
    assert answer(tmp_path, said.append) == protocol.DONE
    assert isinstance(said[-1], Result)
    report = said[-1].report
    assert report["rows_duplicate"] == 3 and report["rows_empty"] == 1
    assert report["turns"] == {"user": 9, "assistant": 10, "tool": 1}


_CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}


def test_the_address_space_is_divided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 30, 8 << 30))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert forks.allowed_processes() == 4
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 30, 1 << 30))
    assert forks.allowed_processes() == 1


def test_each_process_is_bound_by_its_part():
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, limit[1]))
    try:
        assert spread(lambda _: resource.getrlimit(resource.RLIMIT_AS)[0], 2) == [32 << 30] * 2
        with pytest.raises(MemoryError):
            spread(lambda index: bytearray(index * (40 << 30)), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_the_first_trouble_ends_all():
    def work(index: int) -> None:
        if index == 0:
            raise ValueError("the first")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(ValueError, match="the first"):
        spread(work, 2)
    with pytest.raises(RuntimeError, match="died with 9"):
        spread(lambda index: os._exit(9) if index else None, 2)
    assert time.monotonic() - started < 30
