"""Every format that is read, and every way in which a file can be broken, by row."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import InvalidInput, TooLarge, UserError
from worker.data.limits import Limits
from worker.data.read import READERS, read_rows
from worker.data.source import ENDINGS, Source

ROWS = [{"text": "the fox"}, {"text": 'a "quoted", line\nand the sea é'}, {"text": "birds"}]


def read(path: Path, data: bytes | str, **limits: int) -> list[tuple[int, Any]]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_rows(Source(path, Limits(**limits))))


def refusal(path: Path, data: bytes | str, **limits: int) -> str:
    """Return why a file is refused: as a whole, or the first bad row of it."""
    try:
        rows = read(path, data, **limits)
    except UserError as error:
        found: UserError = error
    else:
        found = next(row for _, row in rows if isinstance(row, InvalidInput))
    assert found.param == "dataset" and found.message.startswith("dataset: ")
    return f"{found.message} | {found.hint}"


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl(ROWS)),
        ("a.jsonl", "\ufeff" + jsonl(ROWS)),
        ("a.jsonl", jsonl(ROWS).rstrip("\n")),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.json", jsonl(ROWS)),
        ("noname", jsonl(ROWS)),
        ("noname", json.dumps(ROWS)),
        ("a.csv", 'text\nthe fox\n"a ""quoted"", line\nand the sea é"\nbirds\n'),
        ("a.csv", '\ufefftext\r\nthe fox\r\n"a ""quoted"", line\nand the sea é"\r\n\r\nbirds\r\n'),
        ("a.tsv", 'text\tother\nthe fox\t1\n"a ""quoted"", line\nand the sea é"\t2\nbirds\t3\n'),
    ],
)
def test_a_format_is_told_apart_by_content_and_name(tmp_path: Path, name: str, data: str):
    assert [(number, row["text"]) for number, row in read(tmp_path / name, data)] == [
        (number, row["text"]) for number, row in enumerate(ROWS, 1)
    ]


def test_parquet_in_several_groups(tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": f"row {index}"}]} for index in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=70)
    found = list(read_rows(Source(tmp_path / "a.parquet")))
    assert [row for _, row in found] == rows and [number for number, _ in found] == list(range(1, 301))


def test_an_array_larger_than_the_window(tmp_path: Path):
    rows = [{"text": f'{index} é\\"}}]{{[' * (index % 977)} for index in range(1500)]
    assert [row for _, row in read(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))] == rows


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path):
    assert [number for number, _ in read(tmp_path / "a.jsonl", '\n{"text": "a"}\n  \n{"text": "b"}\n')] == [2, 4]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file holds no rows"),
        (jsonl(ROWS * 2) + '{"text": }\n', "row 7: broken JSON: Expecting value at character 10"),
        (
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "row 2: is not UTF-8 at byte 24 of the file (0xff) | save the file as UTF-8",
        ),
        (b'{"text": "a"}\n{"text": "\x00"}\n', "row 2: holds a NUL byte at byte 24 of the file"),
        (b"\xff\xfe{\x00}\x00", "looks like UTF-16"),
        (b"\x1f\x8b\x08\x00abc", "the file is gzip-compressed | unpack it"),
        (b"PK\x03\x04abc", "a zip archive or a spreadsheet | unpack it; save a spreadsheet as CSV"),
        ('{"text": "a", "text": "b"}\n', "row 1: the key 'text' appears twice"),
        ('{"text": "a", "n": {"x": 1, "x": 2}}\n', "row 1: the key 'x' appears twice"),
        ('{"text": NaN}\n', "row 1: NaN is not JSON"),
        ('{"text": ' + "9" * 5000 + "}\n", "row 1: a number has too many digits"),
        ('[{"text": "a"}]x\n', "the file goes on after the end of its JSON array"),
        ('"text"\n', "row 1: is a string, not an object"),
        ("null\n", "row 1: is null, not an object"),
        ('{"text": ' + "[" * 100_000 + "\n", "row 1: the nesting is too deep"),
        ('{"text": ' + "[" * 40 + "]" * 40 + "}\n", "row 1: is nested deeper than 32 levels"),
        (json.dumps({str(index): 1 for index in range(300)}), "row 1: has 300 columns, more than 256"),
    ],
)
def test_broken_lines(tmp_path: Path, data: bytes | str, words: str):
    assert words in refusal(tmp_path / "a.jsonl", data)


def test_a_bad_line_hides_no_other(tmp_path: Path):
    rows = read(tmp_path / "a.jsonl", '{"text": 1\n{"text": "b"}\n[]\n{"text": "d"}\n')
    assert [isinstance(row, InvalidInput) for _, row in rows] == [True, False, True, False]


def test_a_long_line_is_passed_over(tmp_path: Path):
    data = json.dumps({"text": "x" * 5000}) + "\n" + jsonl(ROWS)
    rows = read(tmp_path / "a.jsonl", data, max_row_bytes=1000)
    assert isinstance(rows[0][1], InvalidInput) and "row 1: is longer than 1,000 bytes" in rows[0][1].message
    assert [number for number, _ in rows] == [1, 2, 3, 4] and rows[1][1] == ROWS[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('[{"text": "a"}, {"text": }]', "row 2: broken JSON"),
        ('[{"text": "a"} {"text": "b"}]', "row 2: broken JSON: expected , or ]"),
        ('[{"text": "a"}, {"text": "b"', "row 2: broken JSON"),
        ('[{"text": "a"},', "row 2: is not an object"),
        ("[1, 2]", "row 1: is not an object"),
        ("[]", "the file holds no rows"),
        ("[" * 100_000, "row 1: the nesting is too deep"),
        ('[{"a": 1, "a": 2}]', "row 1: the key 'a' appears twice"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "not UTF-8 at byte 26 of the file"),
        (b'[{"text": "\x00"}]', "NUL byte"),
        ('[{"text": "' + "x" * 300_000 + '"}]', "row 1: is longer than 100,000 bytes"),
        ('[{"text": "' + "x" * 300_000, "row 1: is longer than 100,000 bytes"),
    ],
)
def test_broken_arrays(tmp_path: Path, data: bytes | str, words: str):
    assert words in refusal(tmp_path / "a.json", data, max_row_bytes=100_000)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("prompt,completion\na\n", "row 1: has 1 fields where the header has 2"),
        ("text,text\na,b\n", "the header names 'text' twice"),
        ("text\n", "the file holds no rows"),
        ('text\n"a"b\nc\n', "row 1: broken CSV in line 2"),
        (b"text\n\xff\n", "line 2: is not UTF-8 at byte 5"),
        ('text\n"abc', "row 1: broken CSV"),
    ],
)
def test_broken_csv(tmp_path: Path, data: bytes | str, words: str):
    assert words in refusal(tmp_path / "a.csv", data)


def test_broken_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    assert "not readable Parquet" in refusal(path, b"PAR1 and no more")
    assert "named .parquet but is not Parquet" in refusal(path, b"text\n")
    pq.write_table(pa.table({"text": ["a"] * 1000}), path)
    data = path.read_bytes()
    assert "not readable Parquet" in refusal(path, data[: len(data) // 2])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize(
    ("limits", "words"), [({"max_rows": 50}, "more than 50 rows"), ({"max_bytes": 500}, "500 bytes")]
)
def test_limits_hold_for_every_format(tmp_path: Path, name: str, limits: dict[str, int], words: str):
    rows = [{"text": f"row {index}"} for index in range(100)]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        texts = {"a.jsonl": jsonl(rows), "a.json": json.dumps(rows), "a.csv": "text\n" + "x\n" * 300}
        path.write_text(texts[name])
    with pytest.raises(TooLarge, match=words) as caught:
        list(read_rows(Source(path, Limits(**limits))))
    assert "TUNERY_MAX" in (caught.value.hint or "")


def test_a_small_parquet_that_expands_is_stopped(tmp_path: Path):
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": pa.DictionaryArray.from_arrays([0] * 5000, ["x" * 1_000_000])}), path)
    assert path.stat().st_size < 2_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        list(read_rows(Source(path, Limits(max_bytes=100_000_000))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000


def test_every_ending_that_is_read_is_kept_by_who_fetches_the_file():
    assert {*READERS, ".parquet"} == set(ENDINGS)


def test_an_unknown_format_is_told_by_its_beginning(tmp_path: Path):
    told = refusal(tmp_path / "train", "\n# A title\x1b\nand more of it")
    assert "the format of the file is not known; it begins with '# A title\\x1b\\nand more '" in told
    assert "| accepted are JSONL" in told
