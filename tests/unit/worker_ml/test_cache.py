"""The cache of folders on real disks: what is torn is noticed, what is unused goes first, what is read stays."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.ml.cache import MANIFEST, BadEntry, Cache, NoRoom

BIG = 1 << 40


def filled(text: str = "weights", facts: dict[str, Any] | None = None) -> Callable[[Path], dict[str, Any]]:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "a.safetensors").write_text(text)
        (folder / "b.json").write_text("{}")
        return facts or {"seal": "s"}

    return fill


def read(cache: Cache, key: str) -> str | None:
    with cache.reading(key) as entry:
        if entry is None:
            return None
        with entry.verified():
            return (entry.path / "a.safetensors").read_text()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", BIG, 0)


def test_what_was_written_is_read_back(cache: Cache, tmp_path: Path):
    assert read(cache, "k") is None and not cache.has("k")
    size = cache.add("k", 9, filled(facts={"seal": "x"}))
    assert size == sum(path.stat().st_size for path in (tmp_path / "cache" / "k").iterdir())
    assert read(cache, "k") == "weights" and cache.has("k") and read(cache, "other") is None
    with cache.reading("k") as entry:
        assert entry is not None and entry.facts == {"seal": "x"}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["k"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def other_key(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"k"', '"other"'))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda path: flip(path / "a.safetensors"), "the content of a.safetensors has changed"),
    "truncated": (lambda path: os.truncate(path / "a.safetensors", 3), "a.safetensors has 3 bytes, not 7"),
    "missing": (lambda path: (path / "b.json").unlink(), "its files are not those"),
    "added": (lambda path: (path / "c.safetensors").write_text(""), "its files are not those"),
    "no_manifest": (lambda path: (path / MANIFEST).unlink(), "manifest cannot be opened"),
    "torn_manifest": (lambda path: os.truncate(path / MANIFEST, 20), "manifest is broken"),
    "empty_manifest": (lambda path: os.truncate(path / MANIFEST, 0), "manifest is broken"),
    "odd_manifest": (lambda path: (path / MANIFEST).write_text("[1]"), "manifest is broken"),
    "swapped": (other_key, "that of another entry"),
    "a_file": (lambda path: (shutil.rmtree(path), path.write_text("x")), "manifest cannot be opened"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_a_new_entry_takes_its_place(cache: Cache, tmp_path: Path, damage: str):
    cache.add("k", 9, filled())
    harm, words = DAMAGE[damage]
    harm(tmp_path / "cache" / "k")
    with pytest.raises(BadEntry, match=words):
        read(cache, "k")
    cache.drop("k")
    assert read(cache, "k") is None and not list((tmp_path / "cache").iterdir())
    assert cache.add("k", 9, filled()) and read(cache, "k") == "weights"


def test_the_longest_unused_goes_first(tmp_path: Path):
    cache = Cache(tmp_path, BIG, 0)
    size = cache.add("a", 9, filled())
    for count, key in enumerate("bcd"):
        cache.add(key, 9, filled())
        os.utime(tmp_path / key / MANIFEST, (count, count))
    os.utime(tmp_path / "a" / MANIFEST, (0, 0))
    read(cache, "a")  # no longer the oldest
    Cache(tmp_path, 3 * size, 0).add("e", size, filled())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d", "e"]


def test_what_is_read_is_not_removed_for_another(tmp_path: Path):
    cache = Cache(tmp_path, BIG, 0)
    size = cache.add("a", 9, filled())
    small = Cache(tmp_path, size, 0)
    with cache.reading("a"), pytest.raises(NoRoom, match="more than the cache may hold"):
        small.add("b", size, filled())
    assert read(cache, "a") == "weights" and not cache.has("b")
    small.add("b", size, filled())
    assert read(cache, "a") is None and read(cache, "b") == "weights"


def test_what_never_fits_removes_nothing(tmp_path: Path):
    cache = Cache(tmp_path, 1000, 0)
    cache.add("a", 9, filled())
    with pytest.raises(NoRoom):
        cache.add("b", 1001, filled())
    assert read(cache, "a") == "weights"


def test_the_reserve_of_the_disk_is_left_free(tmp_path: Path):
    Cache(tmp_path, BIG, 0).add("a", 9, filled())
    full = Cache(tmp_path, BIG, shutil.disk_usage(tmp_path).total)
    with pytest.raises(NoRoom, match="its reserve"):
        full.add("b", 9, filled())
    assert not list(tmp_path.iterdir()), "what is kept gives way for jobs"


def test_a_disk_that_fills_up_costs_the_entry(cache: Cache, tmp_path: Path):
    cache.add("a", 9, filled())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.add("b", 9, filled("x" * 10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a"] and read(cache, "a") == "weights"


def test_of_many_writers_one_wins_and_readers_see_whole_entries(cache: Cache, tmp_path: Path):
    gate, sizes, seen = threading.Barrier(9), [], []

    def write(number: int) -> None:
        gate.wait()
        sizes.append(cache.add("k", 9, filled(str(number) * 50_000)))

    def look() -> None:
        gate.wait()
        while (len(seen) < 200 and len(sizes) < 8) or not seen:
            if (found := read(cache, "k")) is not None:
                seen.append(found)

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)] + [threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) == 8 and sum(map(bool, sizes)) == 1
    assert len(set(seen)) == 1 and len(seen[0]) == 50_000
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["k"]


WRITER = """
import sys, time
from pathlib import Path
from worker.ml.cache import Cache
def fill(folder):
    (folder / "a.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
Cache(Path(sys.argv[1]), 1 << 40, 0).add("k", 9, fill)
"""


def test_what_a_killed_writer_left_is_cleared_and_that_of_a_living_one_is_not(tmp_path: Path):
    cache = Cache(tmp_path, BIG, 0)
    root = Path(__file__).parents[3]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=root)
    try:
        assert writer.stdout and writer.stdout.readline() == b"writing\n"
        cache.add("a", 9, filled())
        assert len(list(tmp_path.iterdir())) == 2 and read(cache, "k") is None
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    cache.add("b", 9, filled())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_manifest_names_no_file_outside(cache: Cache, tmp_path: Path):
    cache.add("k", 9, filled())
    path = tmp_path / "cache" / "k" / MANIFEST
    values = json.loads(path.read_text())
    values["files"]["../../secret"] = values["files"].pop("b.json")
    path.write_text(json.dumps(values))
    with pytest.raises(BadEntry, match="its files are not those"):
        read(cache, "k")
