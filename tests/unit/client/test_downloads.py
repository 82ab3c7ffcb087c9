"""Downloads: whole and verified, resumed where they broke off, and nowhere but in the folder."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from common.client import DownloadFailed, Tunery, fetching
from tests.unit.client.conftest import KEY
from tests.unit.client.peer import Answer, Peer, file, hangs_up, problem, says

CONTENT = os.urandom(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store():
    """The object store is another host than the API: here, another port."""
    with Peer() as store:
        yield store


@pytest.fixture
def publish(peer: Peer, store: Peer):
    """Return a function that publishes one file of a job under a name; the store serves it by a script."""

    def publish(*answers: Answer, name: str = "adapter/adapter_model.safetensors", sha: str = SHA) -> None:
        links = [{"name": name, "bytes": len(CONTENT), "sha256": sha, "url": f"{store.url}/file?signature=1"}]
        peer.on("GET", "/jobs/job_1/artifacts", says({"data": links}))
        store.on("GET", "/file", *answers)

    return publish


def parts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


def test_every_file_is_laid_out_by_name_and_the_store_never_sees_the_key(client: Tunery, publish, store, tmp_path):
    publish(file(CONTENT))
    told = []
    paths = client.jobs.download("job_1", tmp_path / "out", on_progress=lambda *report: told.append(report))
    assert paths == [tmp_path / "out" / "adapter" / "adapter_model.safetensors"]
    assert paths[0].read_bytes() == CONTENT
    assert told[-1] == ("adapter/adapter_model.safetensors", len(CONTENT), len(CONTENT))
    assert all("authorization" not in seen.headers and KEY not in str(seen.headers) for seen in store.requests)
    assert parts(tmp_path) == []


def test_it_goes_on_where_the_connection_broke(client: Tunery, publish, store: Peer, tmp_path: Path):
    publish(file(CONTENT, breaks_after=1_000_000), hangs_up, problem(503, "slow_down"), file(CONTENT))
    assert client.jobs.download("job_1", tmp_path)[0].read_bytes() == CONTENT
    asked = [seen.headers.get("range") for seen in store.requests]
    assert asked == [None, "bytes=1000000-", "bytes=1000000-", "bytes=1000000-"]


def test_a_full_disk_is_told_and_what_arrived_is_kept(
    client: Tunery, publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(file(CONTENT))
    write, room = os.write, 1000

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, data[:room])
        room -= done
        return done

    monkeypatch.setattr(fetching.os, "write", full)
    with pytest.raises(DownloadFailed, match=r"cannot be written to .*: No space left on device") as failed:
        client.jobs.download("job_1", tmp_path)
    assert "make room" in (failed.value.hint or "")
    room = 10**9
    client.jobs.download("job_1", tmp_path)
    assert any(path.read_bytes() == CONTENT for path in tmp_path.rglob("*") if path.is_file())


def test_also_in_the_next_run(client: Tunery, publish, store: Peer, tmp_path: Path):
    publish(file(CONTENT, breaks_after=2_000_000), *[hangs_up] * 6, file(CONTENT))
    with pytest.raises(DownloadFailed, match="did not arrive") as caught:
        client.jobs.download("job_1", tmp_path)
    assert "goes on" in caught.value.hint
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert client.jobs.download("job_1", tmp_path)[0].read_bytes() == CONTENT
    assert store.requests[-1].headers["range"] == "bytes=2000000-"


def test_a_store_without_ranges_starts_over(client: Tunery, publish, store: Peer, tmp_path: Path):
    publish(file(CONTENT, breaks_after=1_000_000), file(CONTENT, ranges=False))
    assert client.jobs.download("job_1", tmp_path)[0].read_bytes() == CONTENT
    assert len(store.requests) == 2


def test_what_is_there_already_is_not_fetched_again(client: Tunery, publish, store: Peer, tmp_path: Path):
    publish(file(CONTENT))
    client.jobs.download("job_1", tmp_path)
    client.jobs.download("job_1", tmp_path)
    assert len(store.requests) == 1
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * len(CONTENT))
    client.jobs.download("job_1", tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == CONTENT


def test_changed_content_is_never_put_in_place(client: Tunery, publish, store: Peer, tmp_path: Path):
    publish(file(CONTENT[:-1] + b"!"), sha="0" * 64)
    with pytest.raises(DownloadFailed, match="SHA-256") as caught:
        client.jobs.download("job_1", tmp_path)
    assert caught.value.code == "hash_mismatch"
    assert len(store.requests) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_wrong_part_of_an_earlier_run_is_mended(client: Tunery, publish, tmp_path: Path):
    publish(file(CONTENT, breaks_after=1_000_000), *[hangs_up] * 6, file(CONTENT))
    with pytest.raises(DownloadFailed):
        client.jobs.download("job_1", tmp_path)
    (part,) = parts(tmp_path)
    part.write_bytes(b"z" * 1_000_000)
    assert client.jobs.download("job_1", tmp_path)[0].read_bytes() == CONTENT


def test_a_store_that_sends_more_than_was_published_fills_no_disk(client: Tunery, publish, tmp_path: Path):
    publish(file(CONTENT + b"more" * 1_000_000))
    with pytest.raises(DownloadFailed, match="longer"):
        client.jobs.download("job_1", tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= len(CONTENT)


def test_a_link_whose_time_is_over_is_asked_for_again(client: Tunery, publish, peer: Peer, tmp_path: Path):
    publish(problem(403, "AccessDenied"), file(CONTENT))
    assert client.jobs.download("job_1", tmp_path)[0].read_bytes() == CONTENT
    assert len(peer.asked("GET", "/jobs/job_1/artifacts")) == 2


def test_a_link_that_stays_refused_is_an_error(client: Tunery, publish, store: Peer, tmp_path: Path):
    publish(problem(403, "AccessDenied"))
    with pytest.raises(DownloadFailed, match="403"):
        client.jobs.download("job_1", tmp_path)
    assert len(store.requests) == 2


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "a/../../evil",
        "a//b",
        "",
        ".",
        "a/.",
        "a\\..\\b",
        "C:x",
        "a\x00b",
        "con\n",
        "a/b/",
        "a .",
    ],
)
def test_unsafe_names_are_refused_before_anything_is_fetched(client: Tunery, publish, store, tmp_path, name):
    publish(file(CONTENT), name=name)
    with pytest.raises(DownloadFailed, match="unsafe name"):
        client.jobs.download("job_1", tmp_path / "out")
    assert store.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_folder_leads_nothing_out_of_it(client: Tunery, publish, tmp_path: Path):
    publish(file(CONTENT))
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter").symlink_to(tmp_path / "outside")
    with pytest.raises(DownloadFailed, match="leads out"):
        client.jobs.download("job_1", tmp_path / "out")
    assert list((tmp_path / "outside").iterdir()) == []


def test_adapter_only_and_nothing_published(client: Tunery, peer: Peer, store: Peer, tmp_path: Path):
    link = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest(), "url": f"{store.url}/empty"}
    listed = [{**link, "name": "reports/loss.json"}, {**link, "name": "adapter/empty"}]
    peer.on("GET", "/jobs/job_1/artifacts", says({"data": listed}))
    peer.on("GET", "/jobs/job_2/artifacts", says({"data": []}))
    store.on("GET", "/empty", file(b""))
    assert client.jobs.download("job_1", tmp_path, adapter_only=True) == [tmp_path / "adapter" / "empty"]
    assert not (tmp_path / "reports").exists()
    with pytest.raises(DownloadFailed, match="published no files"):
        client.jobs.download("job_2", tmp_path)
    peer.on("GET", "/jobs/job_3/artifacts", says({"data": [{**link, "name": "merged/config.json"}]}))
    with pytest.raises(DownloadFailed, match="published no adapter") as caught:
        client.jobs.download("job_3", tmp_path, adapter_only=True)
    assert caught.value.code == "no_adapter" and "an export merges" in str(caught.value.hint)
