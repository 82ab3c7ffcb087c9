"""Attempts end as they should: real database, real store, real child processes, the hash trainer."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from pathlib import Path

import psutil
import pytest
from sqlalchemy import select, update

from common.db.engine import db_now
from common.db.rows import JobRow, MetricRow
from common.jobs import lifecycle, queries
from common.storage import keys
from tests.worker.conftest import TENANT, Bench
from worker.sweeper import Sweeper


def trainers(bench: Bench) -> list[psutil.Process]:
    """Return the trainer processes that this test process has now."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "tests.faults.hash_trainer" in " ".join(process.cmdline())]


def test_a_job_is_checked_trained_and_published(bench: Bench):
    job_id = bench.submit(steps=6)
    bench.check()
    assert bench.row(job_id).status == "queued" and bench.row(job_id).preflight == {"rows": 2}
    bench.train()
    row = bench.row(job_id)
    assert (row.status, row.step, row.max_steps, row.base_revision) == ("succeeded", 6, 6, "c0ffee")
    manifest = json.loads(bench.context.store.get_bytes(row.manifest_key))
    assert manifest["dataset_sha256"] == row.dataset_sha256 and manifest["spec"] == row.spec
    assert manifest["base"] == {"id": "org/tiny", "revision": "c0ffee", "path": None}
    assert not any(Path(bench.context.settings.work_dir).rglob("job_*")), "the working folder is left behind"


def test_the_archive_holds_the_adapter_folder(bench: Bench, tmp_path: Path):
    job_id = bench.submit()
    bench.check(), bench.train()
    key = keys.attempt(TENANT, job_id, bench.row(job_id).epoch) + keys.ADAPTER_ARCHIVE
    bench.context.store.get_file(key, tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def test_a_model_is_published_without_an_archive(bench: Bench):
    job_id = bench.submit(method="full")
    bench.check(), bench.train()
    row = bench.row(job_id)
    assert row.status == "succeeded", row.error
    manifest = json.loads(bench.context.store.get_bytes(row.manifest_key))
    assert "archive" not in manifest
    assert [file["name"] for file in manifest["files"]] == ["model/config.json", "model/model.safetensors"]


def test_the_same_job_gives_the_same_bytes(bench: Bench):
    data = bench.dataset()
    first, second = bench.submit(data), bench.submit(data)
    bench.check(), bench.train()
    assert bench.adapter(first) == bench.adapter(second)


def test_a_bad_row_is_refused_before_a_gpu_is_asked_for(bench: Bench):
    job_id = bench.submit(bench.dataset('{"text": "a"}\n{"text": \n'))
    bench.check()
    row = bench.row(job_id)
    assert row.status == "failed" and row.attempts == 0
    assert row.error["message"] == "dataset: row 2 is not JSON" and row.error["param"] == "dataset"


def test_a_dataset_that_changed_after_its_check_is_refused(bench: Bench):
    job_id = bench.submit()
    bench.check()
    with bench.context.write() as session:
        session.execute(update(JobRow).values(dataset_sha256="0" * 64))
    bench.train()
    assert bench.row(job_id).error["code"] == "dataset_changed"


@pytest.mark.parametrize("check", ["crash", "greedy"])
def test_a_check_that_dies_again_and_again_ends_the_job(bench: Bench, check: str):
    job_id = bench.submit(check=check)
    bench.check()
    assert bench.row(job_id).status == "failed" and bench.row(job_id).error["code"] == "check_died"


@pytest.mark.parametrize(
    ("fault", "code", "attempts"),
    [("bad_input", "bad_row", 1), ("diverge", "diverged", 1), ("crash", "crash_loop", 3), ("oom", "out_of_memory", 4)],
)
def test_failures_are_told_apart(bench: Bench, fault: str, code: str, attempts: int):
    job_id = bench.submit(fault=fault)
    bench.check(), bench.train()
    row = bench.row(job_id)
    assert (row.status, row.error["code"], row.attempts) == ("failed", code, attempts)


@pytest.mark.parametrize("fault", ["device", "full", "crash", "oom"])
def test_a_fault_that_passes_leaves_no_trace_in_the_adapter(bench: Bench, fault: str):
    data = bench.dataset()
    quiet = bench.submit(data)
    disturbed = bench.submit(data, fault=fault, fault_at=4, fault_attempts=1)
    bench.check(), bench.train()
    assert bench.row(disturbed).status == "succeeded" and bench.row(disturbed).attempts == 2
    assert bench.adapter(disturbed) == bench.adapter(quiet)
    assert "job.restored" in bench.events(disturbed)


def test_a_hung_trainer_is_ended(bench: Bench, context):
    object.__setattr__(context.settings, "progress_deadline_s", 0.5)
    job_id = bench.submit(fault="hang", fault_at=3, fault_attempts=1)
    bench.check(), bench.train()
    assert bench.row(job_id).status == "succeeded" and "job.interrupted" in bench.events(job_id)


def test_a_running_job_is_cancelled_and_its_trainer_is_gone(bench: Bench):
    job_id = bench.submit(steps=1000, step_s=0.05)
    bench.check()
    _, thread = bench.start()
    bench.wait(job_id, lambda row: row.step > 2)
    (trainer,) = trainers(bench)
    with bench.context.write() as session:
        lifecycle.request_cancel(session, TENANT, job_id)
    thread.join(20)
    assert bench.row(job_id).status == "cancelled" and not trainer.is_running()


def test_a_running_job_is_paused_and_goes_on_elsewhere(bench: Bench):
    data = bench.dataset()
    quiet, job_id = bench.submit(data, steps=40), bench.submit(data, steps=40, step_s=0.05)
    bench.check()
    _, thread = bench.start()
    bench.wait(job_id, lambda row: row.step > 4)
    with bench.context.write() as session:
        lifecycle.pause(session, TENANT, job_id)
    row = bench.wait(job_id, lambda row: row.status == "paused")
    thread.join(20)
    assert 4 < row.step < 40
    with bench.context.write() as session:
        lifecycle.resume(session, TENANT, job_id)
    bench.train()
    assert bench.row(job_id).status == "succeeded" and bench.adapter(job_id) == bench.adapter(quiet)


def test_a_drained_worker_gives_its_job_back_at_the_next_step(bench: Bench):
    job_id = bench.submit(steps=150, step_s=0.05)
    bench.check()
    supervisor, thread = bench.start()
    bench.wait(job_id, lambda row: row.step > 4)
    supervisor.draining.set()
    thread.join(30)
    row = bench.row(job_id)
    assert row.status == "queued" and row.crashes == row.faults == 0
    bench.train()
    assert bench.row(job_id).status == "succeeded"
    with bench.context.read() as session:
        points = session.scalars(select(MetricRow).where(MetricRow.job_id == job_id).order_by(MetricRow.seq))
        assert [point.step for point in points] == list(range(1, 151)), "a step was lost or done twice"


def test_a_worker_that_lost_its_lease_writes_nothing(bench: Bench):
    job_id = bench.submit(steps=400, step_s=0.05)
    bench.check()
    _, thread = bench.start()
    row = bench.wait(job_id, lambda row: row.step > 2)
    (trainer,) = trainers(bench)
    with bench.context.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(lease_expires_at=db_now() - 1))
        # Not claimed again by the same worker, whose queue is what waits.
        assert lifecycle.expire(session, [job_id]) == {job_id: "queued"}
        lifecycle.pause(session, TENANT, job_id)
    thread.join(20)
    after = bench.row(job_id)
    assert (after.status, after.epoch) == ("paused", row.epoch) and not trainer.is_running()
    assert bench.events(job_id)[-2:] == ["job.lease_expired", "job.paused"]


def test_a_killed_trainer_costs_one_checkpoint_interval_at_most(bench: Bench):
    data = bench.dataset()
    quiet, job_id = bench.submit(data, steps=30), bench.submit(data, steps=30, step_s=0.05)
    bench.check()
    _, thread = bench.start()
    bench.wait(job_id, lambda row: row.step > 10)
    (trainer,) = trainers(bench)
    os.kill(trainer.pid, signal.SIGKILL)
    thread.join(30)
    assert bench.row(job_id).status == "succeeded" and bench.adapter(job_id) == bench.adapter(quiet)


@pytest.mark.parametrize("damage", ["missing file", "changed file", "missing manifest"])
def test_a_checkpoint_that_is_not_whole_is_refused(bench: Bench, damage: str):
    data, store = bench.dataset(), bench.context.store
    quiet, job_id = bench.submit(data, steps=20), bench.submit(data, steps=20, step_s=0.1)
    bench.check()
    _, thread = bench.start()
    bench.wait(job_id, lambda row: row.step > 6)
    with bench.context.write() as session:
        lifecycle.pause(session, TENANT, job_id)
    thread.join(30)
    with bench.context.read() as session:
        newest, older, *_ = queries.checkpoints(session, job_id)
    name = newest.prefix + ("manifest.json" if damage == "missing manifest" else "state.json")
    if damage == "changed file":
        store.put_bytes(name, b'{"step": 7, "value": "forged"}')
    else:
        store.delete([name])
    with bench.context.write() as session:
        lifecycle.resume(session, TENANT, job_id)
    bench.train()
    assert bench.row(job_id).status == "succeeded" and bench.adapter(job_id) == bench.adapter(quiet)
    with bench.context.read() as session:
        told = {event.name: event.data for event in queries.events(session, job_id).data}
    assert told["checkpoint.refused"]["step"] == newest.step and told["job.restored"]["step"] == older.step


def test_a_worker_without_the_disk_reserve_takes_no_job(bench: Bench):
    job_id = bench.submit()
    bench.check()
    object.__setattr__(bench.context.settings, "disk_reserve_bytes", 1 << 60)
    assert bench.supervisor().work_off() == 0
    assert (bench.row(job_id).status, bench.row(job_id).attempts) == ("queued", 0)
    object.__setattr__(bench.context.settings, "disk_reserve_bytes", 0)
    assert bench.supervisor().work_off() == 1 and bench.row(job_id).status == "succeeded"


def test_the_trainer_holds_no_credentials(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    for name in ("TUNERY_S3_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "TUNERY_HF_TOKEN", "DATABASE_URL"):
        monkeypatch.setenv(name, "canary")
    job_id = bench.submit()
    bench.check(), bench.train()
    seen = bench.row(job_id).report["environment"]
    assert "PATH" in seen and "canary" not in seen.values()
    assert not [name for name in seen if name.startswith("TUNERY_")]


def test_one_sweeper_leads_at_a_time(bench: Bench):
    first, second = Sweeper(bench.context), Sweeper(bench.context)
    assert first.leads() and first.leads() and not second.leads()
    first.resign()
    assert second.leads() and not first.leads()
