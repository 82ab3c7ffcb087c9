"""Broken text files: bytes that are no JSON Lines, no JSON array and no CSV, in every way that somebody has met."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

from tests.hostile.checking import Bad, Content


def jsonl(name: str, content: Content, says: str) -> Bad:
    return Bad(name, "a.jsonl", content, says)


def array(name: str, content: Content, says: str) -> Bad:
    return Bad(name, "a.json", content, says)


def table(name: str, content: Content, says: str) -> Bad:
    return Bad(name, "a.csv", content, says)


GOOD = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n"
TEXT = '{"text": "the fox"}\n'


def _zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.jsonl", GOOD)
    return buffer.getvalue()


def _tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("train.jsonl")
        member.size = len(GOOD)
        archive.addfile(member, io.BytesIO(GOOD.encode()))
    return buffer.getvalue()


def _holes(num_bytes: int, head: bytes = b"", tail: bytes = b"") -> Content:
    # A sparse file: a gigabyte on paper, nothing on the disk.
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(head)
            file.truncate(num_bytes)
            file.seek(num_bytes)
            file.write(tail)

    return write


def _number(digits: str) -> str:
    return f'{{"text": {digits}}}\n'


ENCODINGS = [
    jsonl("UTF-16 little endian with BOM", GOOD.encode("utf-16"), "looks like UTF-16"),
    jsonl("UTF-16 big endian with BOM", b"\xfe\xff" + GOOD.encode("utf-16-be"), "looks like UTF-16"),
    jsonl("UTF-16 without BOM", GOOD.encode("utf-16-le"), "row 1: holds a NUL byte at byte 1"),
    table("UTF-16 as CSV", "text\na\n".encode("utf-16"), "looks like UTF-16"),
    jsonl("UTF-32 with BOM", GOOD.encode("utf-32"), "not UTF-8"),
    jsonl("Latin-1", TEXT.encode() + '{"text": "café"}\n'.encode("latin-1"), "row 2: is not UTF-8 at byte 33"),
    array("Latin-1 in an array", '[{"text": "café"}]'.encode("latin-1"), "not UTF-8 at byte 14"),
    table("Latin-1 in a table", 'text\n"café"\n'.encode("latin-1"), "line 2: is not UTF-8 at byte 9"),
    jsonl("overlong form of a slash", b'{"text": "\xc0\xaf"}\n', "row 1: is not UTF-8 at byte 10"),
    jsonl("a surrogate in UTF-8", b'{"text": "\xed\xa0\x80"}\n', "row 1: is not UTF-8 at byte 10"),
    jsonl("CESU-8 pairs", b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}\n', "row 1: is not UTF-8"),
    jsonl("beyond the last code point", b'{"text": "\xf4\x90\x80\x80"}\n', "row 1: is not UTF-8"),
    jsonl("cut inside a character", '{"text": "é'.encode()[:-1], "row 1: is not UTF-8"),
    array("cut inside a character of an array", '[{"text": "é'.encode()[:-1], "not UTF-8"),
    jsonl("a BOM alone", b"\xef\xbb\xbf", "no rows"),
    jsonl("a BOM in the middle", TEXT + "\ufeff" + TEXT, "row 2: broken JSON"),
    jsonl("a NUL in a line", '{"text": "a\0b"}\n', "row 1: holds a NUL byte at byte 11"),
    array("a NUL in an array", '[{"text": "a\0b"}]', "NUL byte, in or after row 1"),
    table("a NUL in a table", "text\na\0b\n", "line 2: holds a NUL byte"),
    jsonl("nothing but NULs", b"\0" * 4096, "NUL byte"),
    jsonl("a surrogate, escaped", '{"text": "a\\ud800b"}\n', "row 1: text holds a lone surrogate (U+D800)"),
    array("a low surrogate, escaped", '[{"text": "\\udc00"}]', "row 1: text holds a lone surrogate (U+DC00)"),
    jsonl("a NUL, escaped", '{"text": "a\\u0000b"}\n', "row 1: text holds a NUL character"),
    jsonl("a surrogate as a column", '{"\\ud800": "x"}\n', "row 1: has the columns '\\ud800'"),
    jsonl("a surrogate as a role", GOOD.replace("user", "\\ud800"), "row 1: messages[0] role '\\ud800'"),
    jsonl("a NUL as a role", GOOD.replace("user", "\\u0000"), "row 1: messages[0] role '\\x00'"),
]

WRAPPED = [
    jsonl("gzip", gzip.compress(GOOD.encode()), "is gzip-compressed"),
    Bad("gzip by name", "a.jsonl.gz", gzip.compress(GOOD.encode()), "is gzip-compressed"),
    jsonl("a gzip bomb", gzip.compress(b"\0" * 5_000_000, 9), "is gzip-compressed"),
    table("gzip as a table", gzip.compress(b"text\na\n"), "is gzip-compressed"),
    Bad("gzip named Parquet", "a.parquet", gzip.compress(b"PAR1"), "is gzip-compressed"),
    jsonl("bzip2", bz2.compress(GOOD.encode()), "is bzip2-compressed"),
    jsonl("xz", lzma.compress(GOOD.encode()), "is xz-compressed"),
    jsonl("lzma", lzma.compress(GOOD.encode(), lzma.FORMAT_ALONE), "row 1: "),
    jsonl("zstd", b"\x28\xb5\x2f\xfd\x24\x03\x19\x00\x00abc", "is zstd-compressed"),
    jsonl("zip", _zipped(), "is a zip archive or a spreadsheet"),
    table("zip named CSV", _zipped(), "is a zip archive or a spreadsheet"),
    jsonl("an empty zip", b"PK\x05\x06" + b"\0" * 18, "is a zip archive or a spreadsheet"),
    jsonl("tar", _tarred(), "row 1: "),
    table("tar named CSV", _tarred(), "NUL byte"),
    jsonl("7z", b"7z\xbc\xaf\x27\x1c\x00\x04" + b"\0" * 24, "row 1: "),
    jsonl("a program", b"\x7fELF\x02\x01\x01" + b"\0" * 64, "row 1: "),
    jsonl("a pickle", pickle.dumps({"text": os.system}, 4), "row 1: is not UTF-8 at byte 0"),
    jsonl("HTML", "<!doctype html><title>Sign in</title>\n", "row 1: broken JSON"),
    Bad("HTML without a name", "train", "<!doctype html>\n", "it begins with '<!doctype html>"),
    Bad("YAML", "a.yaml", "- text: a\n", "it begins with '- text: a"),
    Bad("Excel", "a.xlsx", _zipped(), "is a zip archive or a spreadsheet"),
    Bad("Arrow", "a.arrow", b"ARROW1\0\0", "is not known"),
    jsonl("SQLite", b"SQLite format 3\0" + b"\0" * 84, "row 1: "),
    jsonl("a Git LFS pointer", "version https://git-lfs.example/v1\noid sha256:00\n", "row 1: "),
]

EMPTY = [
    jsonl("nothing", b"", "the file is empty"),
    Bad("nothing, as Parquet", "a.parquet", b"", "the file is empty"),
    table("nothing, as a table", b"", "the file is empty"),
    jsonl("blanks", " \t \n" * 1000, "the file holds no rows"),
    array("blanks before an array", " " * 100_000, "the file holds no rows"),
    jsonl("newlines", "\n" * 100_000, "the file holds no rows"),
    jsonl("carriage returns", "\r" * 5_000, "the file holds no rows"),
    array("an empty array", "[]", "the file holds no rows"),
    array("an empty array of arrays", "[[]]", "row 1: is an array, not an object"),
    jsonl("an empty object", "{}\n", "row 1: has the columns none"),
    table("a header alone", "prompt,completion\n", "the file holds no rows"),
    table("a blank header", "\n\n\n", "no rows"),
    table("a header without names", ",\na,b\n", "the header names '' twice"),
]

JSON = [
    jsonl("cut in the middle", GOOD * 3 + GOOD[:38], "row 4: broken JSON: Unterminated string"),
    array("cut after a comma", "[" + TEXT.strip() + ",", "row 2: is not an object"),
    array("cut before the end of the array", "[" + TEXT.strip(), "row 2: broken JSON: expected , or ]"),
    array("cut inside an element", '[{"text": "a"}, {"text": "b', "row 2: broken JSON: Unterminated string"),
    jsonl("two values on a line", TEXT.strip() * 2 + "\n", "row 1: broken JSON: Extra data"),
    jsonl("a comma at the end of a line", TEXT.strip() + ",\n", "row 1: broken JSON: Extra data"),
    jsonl("single quotes", "{'text': 'a'}\n", "row 1: broken JSON"),
    jsonl("Python's None", '{"text": None}\n', "row 1: broken JSON"),
    jsonl("a comment", "// rows\n" + TEXT, "row 1: broken JSON"),
    jsonl("a newline in a string", '{"text": "a\nb"}\n', "row 1: broken JSON"),
    jsonl("a control character in a string", '{"text": "a\x1fb"}\n', "row 1: broken JSON: Invalid control"),
    jsonl("a bad escape", '{"text": "\\x41"}\n', "row 1: broken JSON: Invalid \\escape"),
    jsonl("a short escape", '{"text": "\\u12"}\n', "row 1: broken JSON: Invalid \\uXXXX"),
    jsonl("a pretty-printed object", json.dumps({"text": "a"}, indent=1), "row 1: broken JSON"),
    array("an object around the rows", '{"data": [{"text": "a"}]}', "row 1: has the columns 'data'"),
    jsonl("an array inside the lines", TEXT + "[]\n", "row 2: is an array, not an object"),
    array("text after the array", "[" + TEXT.strip() + "] and more", "goes on after the end"),
    array("two arrays", ("[" + TEXT.strip() + "]\n") * 2, "goes on after the end"),
    array("a comma too many", "[" + TEXT.strip() + ",]", "row 2: is not an object"),
    jsonl("a string", '"text"\n', "row 1: is a string, not an object"),
    jsonl("a number", "7\n", "row 1: is a bare value, not an object"),
    jsonl("null", "null\n", "row 1: is null, not an object"),
    array("strings in an array", '["a", "b"]', "row 1: is not an object"),
    jsonl("a key twice", '{"text": "a", "text": "b"}\n', "row 1: the key 'text' appears twice"),
    jsonl("a key twice, once escaped", '{"text": "a", "te\\u0078t": "b"}\n', "row 1: the key 'text' appears"),
    array("a key twice, deep", '[{"messages": [{"role": "user", "role": "x"}]}]', "row 1: the key 'role' appears"),
    jsonl("a long key twice", '{"%s": 1, "%s": 2}\n' % (("k" * 100_000,) * 2), "row 1: the key 'kkk"),
    jsonl("NaN", _number("NaN"), "row 1: NaN is not JSON"),
    array("Infinity", f"[{_number('-Infinity').strip()}]", "row 1: -Infinity is not JSON"),
    jsonl("5,000 digits", _number("1" + "0" * 5_000), "row 1: a number has too many digits"),
    array("a million digits", f"[{_number('9' * 1_000_000).strip()}]", "row 1: a number has too many digits"),
    jsonl("1e400", _number("1e400"), "row 1: text is a number, not a string"),
    jsonl("1e400 as a weight", GOOD.replace('"ho"', '"ho", "weight": 1e400'), "row 1: messages[1].weight is"),
    jsonl("minus zero, octal", _number("-012"), "row 1: broken JSON"),
]

BOMBS = [
    jsonl("nesting by brackets", '{"text": ' + "[" * 1_000_000 + "\n", "row 1: the nesting is too deep"),
    jsonl("nesting by objects", '{"a":' * 500_000 + "\n", "row 1: the nesting is too deep"),
    jsonl("nesting that is closed", '{"a":' + "[" * 100 + "]" * 100 + "}\n", "row 1: is nested deeper than 32"),
    array("nesting in an array", "[" * 1_000_000, "row 1: the nesting is too deep"),
    table("nesting in a table", "messages\n" + "[" * 100_000 + "\n", "row 1: messages is a string that is not"),
    jsonl("a string of JSON in a string", '{"messages": "%s"}\n' % ("[" * 100_000), "row 1: messages is a"),
    jsonl("300 columns", json.dumps({f"c{n}": 1 for n in range(300)}), "row 1: has 300 columns"),
    array("100,000 columns", json.dumps([{f"c{n}": 1 for n in range(100_000)}]), "row 1: has 100000 columns"),
    table("a header of 100,000 columns", ",".join(f"c{n}" for n in range(100_000)) + "\n", "100000 columns"),
    jsonl("a line of 5 MB", '{"text": "%s"}\n' % ("a" * 5_000_000), "row 1: is longer than 4,194,304 bytes"),
    array("an element of 9 MB", '[{"text": "%s"}]' % ("a" * 9_000_000), "row 1: is longer than 4,194,304 bytes"),
    table("a field of 5 MB", "text\n" + "a" * 5_000_000 + "\n", "line 2 is longer than 4,194,304 bytes"),
    jsonl("a line of a gigabyte", _holes(2**30, b'{"text": "'), "row 1: is longer than 4,194,304 bytes"),
    jsonl("a long line before others", _holes(2**26, b"", b"\n{]\n"), "row 2: broken JSON"),
    array("an array of a gigabyte of nothing", _holes(2**30, b"["), "NUL byte, in or after row 1"),
    table("a field of 64 MB", _holes(2**26, b"text\n"), "line 2 is longer than 4,194,304 bytes"),
    table("a header of 64 MB", _holes(2**26), "line 1 is longer than 4,194,304 bytes"),
    Bad("a gigabyte that claims to be Parquet", "a.parquet", _holes(2**30, b"PAR1", b"PAR1"), "not readable Parquet"),
]

TABLES = [
    table("an open quote", 'text\n"abc\n', "row 1: broken CSV"),
    table("an open quote over many lines", 'text\n"abc\n' + "x\n" * 50_000, "row 1: broken CSV"),
    table("a quote over too many bytes", 'text\n"' + ("y" * 99 + "\n") * 50_000, "in or after line 41945 is longer"),
    table("a row of many long fields", "text\n" + ('"' + "y\n" * 50_000 + '",') * 60, "or after line"),
    table("an open quote in the header", '"text\nabc\n', "the header line is broken CSV"),
    table("text after a quote", 'text\n"a"b\n', "row 1: broken CSV"),
    table("too few fields", "prompt,completion\na\n", "row 1: has 1 fields where the header has 2"),
    table("too many fields", "prompt,completion\na,b,c\n", "row 1: has 3 fields where the header has 2"),
    table("a column twice", "text,text\na,b\n", "the header names 'text' twice"),
    table("semicolons", "prompt;completion\na;b\n", "row 1: has the columns 'prompt;completion'"),
    table("tabs in a CSV", "prompt\tcompletion\na\tb\n", "row 1: has the columns 'prompt\\tcompletion'"),
    table("unknown columns", "question,reply\na,b\n", "row 1: has the columns 'question', 'reply'"),
    table("an empty field", 'text\n""\n', "row 1: text is empty"),
    table("a formula as messages", "messages\n=cmd|' /C calc'!A0\n", "row 1: messages is a string that is not"),
    table("a bad conversation", 'messages\n"[{""role"": ""user""}]"\n', "row 1: messages[0] has no content"),
    table("JSON lines named CSV", TEXT + TEXT, "row 1: has the columns"),
    table("JSON array named CSV", '[{"text": "a"}]\n', "no rows"),
    jsonl("CSV named JSON Lines", "text\na\n", "row 1: broken JSON"),
    Bad("a table in a tsv", "a.tsv", "prompt\tcompletion\na\n", "row 1: has 1 fields"),
    table("a column name of a megabyte", "x" * 1_000_000 + "\nb\n", "row 1: has the columns 'xxx"),
    table("a megabyte column twice", ",".join(["x" * 1_000_000] * 2) + "\nb,c\n", "the header names 'xxx"),
]

ALL = [*ENCODINGS, *WRAPPED, *EMPTY, *JSON, *BOMBS, *TABLES]
