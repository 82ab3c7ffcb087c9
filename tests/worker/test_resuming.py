"""A checkpoint that cannot be gone on from costs work, and never the job: the next older one does, or a fresh start."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from sqlalchemy import update

from common.db.rows import CheckpointRow, JobRow
from common.jobs import lifecycle, queries
from tests.worker.conftest import TENANT, Bench


def told(bench: Bench, job_id: str, name: str) -> list[dict[str, Any]]:
    with bench.context.read() as session:
        return [event.data for event in queries.events(session, job_id, limit=1000).data if event.name == name]


def broken_at(bench: Bench, data: str, step: int, **metadata: object) -> str:
    """Submit a job that crashes once before `step`; it leaves a checkpoint at every second step."""
    job_id = bench.submit(data, steps=10, fault="crash", fault_at=step, fault_attempts=1, **metadata)
    bench.check()
    bench.supervisor().work_off(most=1)
    assert bench.row(job_id).status == "queued"
    return job_id


@pytest.mark.parametrize(("refuses_from", "goes_on_from"), [(6, 4), (2, None)])
def test_what_the_trainer_refuses_is_passed_over(bench: Bench, refuses_from: int, goes_on_from: int | None):
    quiet = bench.submit(data := bench.dataset(), steps=10)
    bench.check(), bench.train()
    job_id = broken_at(bench, data, 9, refuses_from=refuses_from)
    bench.train()
    row = bench.row(job_id)
    assert (row.status, row.attempts) == ("succeeded", 2) and bench.adapter(job_id) == bench.adapter(quiet)
    refused = [event["step"] for event in told(bench, job_id, "checkpoint.refused")]
    assert refused == [step for step in (8, 6, 4, 2) if step >= refuses_from]
    assert told(bench, job_id, "job.started_over") == ([] if goes_on_from else [{"checkpoints": 4}])
    assert [event["step"] for event in told(bench, job_id, "job.restored")][-1] == (goes_on_from or 2)


def test_a_trainer_that_refuses_without_a_checkpoint_ends_in_the_crash_loop(bench: Bench):
    """Nothing is left to pass over."""
    job_id = bench.submit(fault="bad_checkpoint", fault_at=1)
    bench.check(), bench.train()
    row = bench.row(job_id)
    assert (row.status, row.attempts) == ("failed", 3) and row.error is not None and row.error["code"] == "crash_loop"


def test_a_checkpoint_of_another_run_is_not_even_fetched(bench: Bench):
    quiet = bench.submit(data := bench.dataset(), steps=10)
    bench.check(), bench.train()
    job_id = broken_at(bench, data, 9)
    with bench.context.read() as session:
        newest, *_ = queries.checkpoints(session, job_id)
    store = bench.context.store
    manifest = json.loads(store.get_bytes(f"{newest.prefix}manifest.json")) | {"config_hash": "0" * 64}
    store.put_bytes(f"{newest.prefix}manifest.json", body := json.dumps(manifest).encode())
    store.delete([f"{newest.prefix}state.json"])
    with bench.context.write() as session:
        same = (CheckpointRow.job_id == job_id, CheckpointRow.step == newest.step)
        sha256 = hashlib.sha256(body).hexdigest()
        session.execute(update(CheckpointRow).where(*same).values(manifest_sha256=sha256))
    bench.train()
    assert bench.row(job_id).status == "succeeded" and bench.adapter(job_id) == bench.adapter(quiet)
    assert [event["step"] for event in told(bench, job_id, "checkpoint.refused")] == [newest.step]
    with bench.context.read() as session:
        messages = [event.message for event in queries.events(session, job_id, limit=1000).data]
    assert any("other settings, another base or other data" in message for message in messages)


def test_a_retry_with_mended_data_starts_over(bench: Bench):
    """The link is the same and what lies there is not: no checkpoint fits, and that is no crash."""
    folder = bench.context.settings.work_dir / "data"
    folder.mkdir(parents=True)
    object.__setattr__(bench.context.settings, "local_datasets", folder)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    uri = f"file://{folder}/rows.jsonl"
    failed = bench.submit(uri, steps=10, fault="diverge", fault_at=6, fault_attempts=1)
    bench.check(), bench.train()
    assert bench.row(failed).status == "failed"
    (folder / "rows.jsonl").write_text('{"text": "mended"}\n')
    with bench.context.write() as session:
        made = lifecycle.retry(session, TENANT, failed)
        # Past the attempts that the fault is for.
        session.execute(update(JobRow).where(JobRow.id == made).values(epoch=10))
    quiet = bench.submit(uri, steps=10)
    bench.check(), bench.train()
    assert bench.row(made).status == "succeeded" and bench.adapter(made) == bench.adapter(quiet)
    assert told(bench, made, "job.started_over") == [{"checkpoints": 2}]


def test_a_retry_after_an_upgrade_goes_on_from_the_old_ones_checkpoints(bench: Bench):
    """The stored job lacks a field that this version knows: the retry takes it as it stands."""
    failed = bench.submit(steps=10)
    bench.check()
    with bench.context.write() as session:
        spec = {name: value for name, value in bench.row(failed).spec.items() if name != "validation_split"}
        spec["metadata"] = {"fault": "diverge", "fault_at": "6", "fault_attempts": "1"}
        session.execute(update(JobRow).where(JobRow.id == failed).values(spec=spec))
    bench.train()
    with bench.context.write() as session:
        made = lifecycle.retry(session, TENANT, failed)
        session.execute(update(JobRow).where(JobRow.id == made).values(epoch=10))
    assert bench.row(made).spec == bench.row(failed).spec
    bench.check(), bench.train()
    assert bench.row(made).status == "succeeded" and told(bench, made, "job.restored") == [{"step": 4}]
