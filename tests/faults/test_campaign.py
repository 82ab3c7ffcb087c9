"""The short form of `make faults`: fifty faults over each database, judged by what is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import report
from tests.faults.campaign import run
from tests.faults.schedule import schedule

NUM_FAULTS = 50


@pytest.mark.timeout(900)
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_nothing_is_lost_and_nothing_runs_twice(database: str, tmp_path: Path):
    seed = int.from_bytes(os.urandom(2))
    print(f"python -m tests.faults --first-seed {seed} --seeds 1 --databases {database} --faults {NUM_FAULTS}")
    outcome = run(seed, database, NUM_FAULTS, keep=tmp_path)
    print(report.line(outcome))
    assert outcome.clean, f"{report.line(outcome)}\nlogs: {tmp_path}\n{outcome.values()}"
    assert sum(outcome.faults.values()) == NUM_FAULTS and outcome.trainers_hit >= 5, outcome.values()
    assert outcome.jobs.get("succeeded", 0) >= 5, outcome.values()


def test_a_schedule_is_a_function_of_its_seed():
    def drawn(seed: int) -> list:
        return schedule(seed, "postgres", 120, mean_s=1.0, lease_s=3.0, with_disk=True)

    assert drawn(7) == drawn(7) != drawn(8)
    kinds = {(fault.what, fault.whom) for fault in drawn(7)}
    assert {("kill", "trainer"), ("kill", "postgres"), ("fill", "disk"), ("half_open", "store")} <= kinds
