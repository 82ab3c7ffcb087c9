"""The client and the command send large files to a real store, and go on where they were killed."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from common.client import AsyncTunery, RequestInvalid, Retries, Tunery, UploadFailed, uploading
from common.settings import child_environment
from common.storage.parts import PART_BYTES_MIN
from tests.api.conftest import Api
from tests.api.gate import Gate
from tests.api.test_uploads import left
from tests.processes import ROOT, wait_until
from tests.servers import S3

QUICK = Retries(limit=4, first_s=0.001, longest_s=0.002)
CONTENT = b"".join(bytes([number]) * PART_BYTES_MIN for number in range(4)) + b"rest\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def gate(s3: S3) -> Iterator[Gate]:
    with Gate(s3.endpoint_url) as made:
        yield made


@pytest.fixture
def api(start: Callable[..., Api], sqlite_url: str, gate: Gate) -> Api:
    """An API whose clients reach the store through the gate."""
    return start(sqlite_url, upload_part_bytes=PART_BYTES_MIN, s3_public_url=gate.url)


@pytest.fixture
def client(api: Api) -> Iterator[Tunery]:
    with Tunery(api.url, api.key, retries=QUICK) as made:
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "big.jsonl"
    path.write_bytes(CONTENT)
    return path


def command(api: Api, file: Path) -> subprocess.Popen[str]:
    """Start `tunery datasets upload` as a user does."""
    values = {"TUNERY_URL": api.url, "TUNERY_API_KEY": api.key, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "common.cli", "datasets", "upload", str(file), "--direct"],
        env=child_environment(values), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=file.parent,
    )  # fmt: skip


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_upload_goes_on_with_what_is_missing(api: Api, gate: Gate, file: Path, by: signal.Signals) -> None:
    gate.holds_from = 3
    with command(api, file) as first:
        try:
            wait_until(lambda: set(gate.passed) == {1, 2} and {3, 4} <= set(gate.seen), 60, "two parts to pass")
            first.send_signal(by)
            said = first.communicate(timeout=30)[1]
        finally:
            first.kill()
    if by is signal.SIGINT:
        assert first.returncode == 130 and "the same command goes on" in said and "Traceback" not in said, said
    gate.opens()
    with command(api, file) as second:
        out, said = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert "going on: " in said and "(50%) are there" in said, said
    assert SHA256 in out
    assert dict(gate.passed) == {3: 1, 4: 1, 5: 1}, "only what was missing"
    assert left(api) == ([f"default/datasets/{SHA256}"], 0)


def test_a_store_that_refuses_and_hangs_up(api: Api, gate: Gate, client: Tunery, file: Path) -> None:
    gate.refusals = {1: ["503"], 2: ["hang up"], 3: ["403"], 5: ["503", "hang up"]}
    told: list[tuple[str, int, int]] = []
    dataset = client.datasets.upload(file, direct=True, on_progress=lambda *report: told.append(report))
    assert dataset.sha256 == SHA256 and dataset.name == "big.jsonl"
    assert dict(gate.passed) == dict.fromkeys(range(1, 6), 1), "no part twice"
    assert told[0] == ("big.jsonl", 0, len(CONTENT)) and told[-1] == ("big.jsonl", len(CONTENT), len(CONTENT))
    assert max(done for _, done, _ in told) == len(CONTENT)


def test_a_link_that_ends_before_it_is_used(start: Callable[..., Api], sqlite_url: str, gate: Gate, file: Path) -> None:
    """The store itself refuses it; the client asks for another."""
    api = start(sqlite_url, upload_part_bytes=PART_BYTES_MIN, s3_public_url=gate.url, link_s=10)
    gate.refusals = {2: ["late"]}
    with Tunery(api.url, api.key, retries=QUICK) as client:
        assert client.datasets.upload(file, direct=True).sha256 == SHA256
    assert gate.seen[2] == 2 and dict(gate.passed) == dict.fromkeys(range(1, 6), 1)


def test_two_names_for_one_content_at_once(api: Api, client: Tunery, file: Path) -> None:
    def another(name: str, done: int, total: int) -> None:
        if done == 0:
            with api.client() as http:
                http.post("/uploads", json={"name": "other", "bytes": len(CONTENT), "sha256": SHA256})

    assert client.datasets.upload(file, direct=True, on_progress=another).name == "big.jsonl"
    assert {dataset.name for dataset in client.datasets.list()} == {"big.jsonl", "other"}


def test_a_store_that_never_takes_a_part(api: Api, gate: Gate, client: Tunery, file: Path) -> None:
    gate.refusals = {4: ["403"] * QUICK.limit}
    with pytest.raises(UploadFailed, match=r"answered 403 \(SlowDown\)") as refusal:
        client.datasets.upload(file, direct=True)
    assert "very-secret" not in str(refusal.value) and refusal.value.hint and "goes on" in refusal.value.hint
    resumed: list[tuple[int, int]] = []
    gate.opens()
    client.datasets.upload(file, direct=True, on_resume=lambda *report: resumed.append(report))
    assert resumed == [(len(CONTENT) - PART_BYTES_MIN, len(CONTENT))] and dict(gate.passed) == {4: 1}


def test_a_store_that_cannot_be_reached(start: Callable[..., Api], sqlite_url: str, file: Path) -> None:
    api = start(sqlite_url, upload_part_bytes=PART_BYTES_MIN, s3_public_url="http://127.0.0.1:9")
    with Tunery(api.url, api.key, retries=QUICK) as client, pytest.raises(UploadFailed) as refusal:
        client.datasets.upload(file, direct=True)
    assert refusal.value.hint and "TUNERY_S3_PUBLIC_URL" in refusal.value.hint


def test_content_that_is_there_is_not_sent(api: Api, gate: Gate, client: Tunery, file: Path) -> None:
    first = client.datasets.upload(file, direct=True)
    gate.opens()
    assert client.datasets.upload(file, direct=True) == first
    assert client.datasets.upload(file, name="other", direct=True).name == "other" and not gate.seen


def test_the_size_chooses_the_way(
    api: Api, gate: Gate, client: Tunery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small.jsonl"
    small.write_bytes(b"0123456789")
    made = client.datasets.upload(small)
    assert not gate.seen and made.bytes == 10
    client.datasets.delete(made.id)
    monkeypatch.setattr(uploading, "DIRECT_BYTES", 10)
    assert client.datasets.upload(small).sha256 == made.sha256 and dict(gate.seen) == {1: 1}
    client.datasets.delete(client.datasets.list().data[0].id)
    client.datasets.upload(small, direct=False)
    assert dict(gate.seen) == {1: 1}


def test_a_file_that_changes_meanwhile_is_refused(api: Api, gate: Gate, client: Tunery, file: Path) -> None:
    def change(name: str, done: int, total: int) -> None:
        if done == 0:
            file.write_bytes(b"x" + CONTENT[1:])

    with pytest.raises(RequestInvalid) as refusal:
        client.datasets.upload(file, direct=True, on_progress=change)
    assert (refusal.value.code, refusal.value.param) == ("hash_mismatch", "sha256")
    assert left(api) == ([], 0) and not client.datasets.list().data

    def cut(name: str, done: int, total: int) -> None:
        if done == 0:
            file.write_bytes(CONTENT[:100])

    with pytest.raises(UploadFailed, match="became shorter"):
        client.datasets.upload(file, direct=True, on_progress=cut)


def test_the_client_of_event_loops(api: Api, gate: Gate, file: Path) -> None:
    told: list[int] = []
    resumed: list[int] = []

    async def run() -> None:
        async with AsyncTunery(api.url, api.key, retries=QUICK) as client:
            gate.holds_from = 3
            async with anyio.create_task_group() as group:

                async def give_up_half_way() -> None:
                    while set(gate.passed) != {1, 2}:
                        await anyio.sleep(0.05)
                    group.cancel_scope.cancel()

                group.start_soon(give_up_half_way)
                with anyio.fail_after(60):
                    await client.datasets.upload(file, direct=True)
            gate.opens()
            dataset = await client.datasets.upload(
                file,
                direct=True,
                on_progress=lambda name, done, total: told.append(done),
                on_resume=lambda there, total: resumed.append(there),
            )
            assert dataset.sha256 == SHA256

    anyio.run(run)
    assert resumed == [2 * PART_BYTES_MIN] and told[0] == 2 * PART_BYTES_MIN and told[-1] == len(CONTENT)
    assert {3, 4, 5} == set(gate.passed)
