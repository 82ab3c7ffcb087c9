"""A form is the same however the network cuts it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from pathlib import Path

import pytest
from fastapi import Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.uploads import Upload, receive
from common.errors import InvalidInput, TooLarge

CONTENT = b"one\r\n--x\r--xtwo\r\n--xy--\r\n" * 20
FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\nContent-Type: text/csv\r\n\r\n'
    + CONTENT
    + b"\r\n--xyz--\r\n"
)


def send(chunks: list[bytes], path: Path, limit: int = 10**6) -> Upload:
    async def network() -> dict[str, object]:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    headers = [(b"content-type", b"multipart/form-data; boundary=xyz")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, network)
    return asyncio.run(receive(request, path, limit))


@given(cuts=st.lists(st.integers(0, len(FORM)), max_size=8))
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_gives_the_same_file(cuts: list[int], tmp_path: Path) -> None:
    edges = [0, *sorted(cuts), len(FORM)]
    chunks = [FORM[start:end] for start, end in itertools.pairwise(edges)]
    upload = send(chunks, tmp_path / "file")
    assert upload == Upload("a.csv", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_one_byte_over_the_limit(tmp_path: Path) -> None:
    assert send([FORM], tmp_path / "file", len(CONTENT)).bytes == len(CONTENT)
    with pytest.raises(TooLarge) as refusal:
        send([FORM], tmp_path / "file", len(CONTENT) - 1)
    assert refusal.value.param == "file"


@pytest.mark.parametrize("length", range(0, len(FORM) - 2, 37))
def test_a_form_that_ends_early_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        send([FORM[:length]], tmp_path / "file")
