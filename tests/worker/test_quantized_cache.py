"""What a worker tells its trainer of the bases that are kept in 4 bit, and what becomes of them when disk is short."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from common.settings import Settings
from tests.worker.conftest import Bench
from worker import bases
from worker.ml.cache import Cache
from worker.workplace import Workplace


def report(bench: Bench) -> dict[str, Any]:
    job_id = bench.submit()
    bench.check(), bench.train()
    row = bench.row(job_id)
    assert row.status == "succeeded", row.error
    return dict(row.report)


def test_the_trainer_gets_the_folder_its_bounds_and_the_moment_of_the_claim(bench: Bench):
    settings = bench.context.settings
    object.__setattr__(settings, "quantized_cache_gib", 2.5)
    before = time.monotonic()
    told = report(bench)
    folder = settings.work_dir.resolve() / "quantized"
    assert told["cache"] == {"path": str(folder), "most_bytes": 5 * 2**29, "reserve_bytes": settings.disk_reserve_bytes}
    assert before < told["claimed_at"] < time.monotonic()


def test_no_folder_is_told_where_the_cache_is_off(bench: Bench):
    object.__setattr__(bench.context.settings, "quantized_cache_gib", 0.0)
    assert report(bench)["cache"] is None and bases.quantized_cache(bench.context.settings) is None


def test_a_process_that_dies_over_the_cache_after_its_result_costs_nothing(bench: Bench):
    data = bench.dataset()
    quiet, dying = bench.submit(data), bench.submit(data, fault="late")
    bench.check(), bench.train()
    row = bench.row(dying)
    assert (row.status, row.attempts) == ("succeeded", 1), row.error
    assert bench.adapter(dying) == bench.adapter(quiet) and "job.interrupted" not in bench.events(dying)


def has_room(settings: Settings) -> bool:
    with closing(Workplace(settings)) as workplace:
        return workplace.has_room()


def test_bases_in_4_bit_give_way_where_the_disk_has_less_than_the_reserve(bench: Bench):
    settings = bench.context.settings
    known = bases.quantized_cache(settings)
    assert known is not None

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "model.safetensors").write_text("weights")
        return {}

    cache = Cache(Path(known.path), known.most_bytes, 0)
    cache.add("a", 7, fill)
    assert has_room(settings) and cache.has("a")
    object.__setattr__(settings, "disk_reserve_bytes", shutil.disk_usage(settings.work_dir).total)
    assert not has_room(settings) and not cache.has("a")
