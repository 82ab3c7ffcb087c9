"""Exports of finished jobs, worked off like any job: real database, store and child processes, the hash trainer."""

from __future__ import annotations

import json
import os
import signal

import pytest
from sqlalchemy import delete, update

from common.db.engine import db_now
from common.db.rows import DatasetRow, JobRow
from common.jobs import lifecycle, queries
from common.schemas.exports import ExportRequest
from tests.worker.conftest import TENANT, Bench
from tests.worker.test_supervision import trainers


def finished(bench: Bench, **asked: object) -> str:
    job_id = bench.submit(**asked)
    bench.check(), bench.train()
    assert bench.row(job_id).status == "succeeded", bench.row(job_id).error
    return job_id


def export(bench: Bench, source: str, *forms: str) -> str:
    with bench.context.write() as session:
        return lifecycle.export(session, TENANT, source, ExportRequest(export=list(forms or ("merged",))))[0]


def files(bench: Bench, job_id: str) -> dict[str, bytes]:
    """Return what a job's artifacts list, as the store has it."""
    with bench.context.read() as session:
        return {row.name: bench.context.store.get_bytes(row.key) for row in queries.artifacts(session, job_id)}


def test_an_export_merges_what_was_published(bench: Bench):
    source = finished(bench)
    before = files(bench, source)
    made = export(bench, source, "merged", "merged_4bit")
    bench.train()
    row = bench.row(made)
    assert (row.status, row.stage, row.attempts) == ("succeeded", None, 1), row.error
    adapter = bench.adapter(source)
    after = files(bench, source)
    assert {name: after[name] for name in before} == before, "what was published stays as it was"
    assert after["merged/model.safetensors"] == adapter + b"merged"
    assert after["merged_4bit/model.safetensors"] == adapter + b"merged_4bit"
    manifest = json.loads(bench.context.store.get_bytes(row.manifest_key))
    assert manifest["source_job"] == source and "archive" not in manifest
    assert {file["name"].split("/")[0] for file in manifest["files"]} == {"merged", "merged_4bit"}
    assert row.manifest_key.startswith(f"{TENANT}/{made}/a{row.epoch}/"), "under a prefix of its own"


@pytest.mark.parametrize("fault", ["crash", "device", "full", "oom"])
def test_a_fault_that_passes_leaves_no_trace(bench: Bench, fault: str):
    # The first attempt of a trained job is the second claim, after its check's.
    source = finished(bench, fault=fault, fault_at=4, fault_attempts=0)
    assert bench.row(source).attempts == 1
    made = export(bench, source)
    bench.train()
    row = bench.row(made)
    assert (row.status, row.attempts) == ("succeeded", 2), row.error
    assert row.report["shrink"] == (fault == "oom") and "job.interrupted" in bench.events(made)
    assert files(bench, made)["merged/model.safetensors"] == bench.adapter(source) + b"merged"


def test_a_killed_export_is_claimed_again(bench: Bench):
    source = finished(bench, steps=60, step_s=0.05)
    made = export(bench, source)
    _, thread = bench.start()
    bench.wait(made, lambda row: row.step > 2)
    (trainer,) = trainers(bench)
    os.kill(trainer.pid, signal.SIGKILL)
    thread.join(30)
    row = bench.row(made)
    assert (row.status, row.attempts) == ("succeeded", 2), row.error


def test_an_export_whose_worker_is_lost_publishes_nothing_stale(bench: Bench):
    source = finished(bench, steps=60, step_s=0.05)
    made = export(bench, source)
    _, thread = bench.start()
    first = bench.wait(made, lambda row: row.step > 2)
    with bench.context.write() as session:
        session.execute(update(JobRow).where(JobRow.id == made).values(lease_expires_at=db_now() - 1))
        assert lifecycle.expire(session, [made]) == {made: "queued"}
        lifecycle.pause(session, TENANT, made)
    thread.join(20)
    assert bench.row(made).status == "paused" and not trainers(bench)
    with bench.context.write() as session:
        lifecycle.resume(session, TENANT, made)
    bench.train()
    row = bench.row(made)
    assert row.status == "succeeded" and row.epoch == first.epoch + 1
    assert all(f"/a{row.epoch}/" in artifact for artifact in keys_of(bench, made))


def keys_of(bench: Bench, job_id: str) -> list[str]:
    with bench.context.read() as session:
        return [row.key for row in queries.artifacts(session, job_id)]


@pytest.mark.parametrize("wish", ["cancel", "pause"])
def test_a_running_export_obeys(bench: Bench, wish: str):
    made = export(bench, finished(bench, steps=60, step_s=0.05))
    _, thread = bench.start()
    bench.wait(made, lambda row: row.step > 2)
    with bench.context.write() as session:
        (lifecycle.request_cancel if wish == "cancel" else lifecycle.pause)(session, TENANT, made)
    thread.join(20)
    assert bench.row(made).status == {"cancel": "cancelled", "pause": "paused"}[wish] and not trainers(bench)
    if wish == "pause":
        with bench.context.write() as session:
            lifecycle.resume(session, TENANT, made)
        bench.train()
        assert bench.row(made).status == "succeeded"


def test_an_export_goes_on_without_its_data(bench: Bench):
    source = finished(bench)
    with bench.context.write() as session:
        session.execute(delete(DatasetRow))
    made = export(bench, source)
    bench.train()
    assert bench.row(made).status == "succeeded", bench.row(made).error
    assert "export.without_data" in bench.events(made)


def test_an_adapter_that_was_altered_is_not_merged(bench: Bench):
    source = finished(bench)
    prefix = bench.row(source).manifest_key.removesuffix("manifest.json")
    bench.context.store.put_bytes(f"{prefix}adapter/adapter_model.safetensors", b"other")
    made = export(bench, source)
    bench.train()
    row = bench.row(made)
    assert (row.status, row.error["code"], row.attempts) == ("failed", "artifact_altered", 1)


@pytest.mark.parametrize("gone", ["row", "objects"])
def test_a_source_that_is_gone_ends_the_export(bench: Bench, gone: str):
    source = finished(bench)
    made = export(bench, source)
    if gone == "row":
        with bench.context.write() as session:
            session.execute(delete(JobRow).where(JobRow.id == source))
    else:
        store = bench.context.store
        store.delete([item.key for item in store.objects(f"{TENANT}/{source}/")])
    bench.train()
    row = bench.row(made)
    assert (row.status, row.error["code"]) == ("failed", "source_gone") and source in row.error["message"]


def test_another_base_in_the_same_folder_is_not_merged_into(bench: Bench):
    source = finished(bench)
    card = bench.context.settings.model_dir / "tiny" / "tunery.json"
    card.write_text(json.dumps({"id": "org/tiny", "revision": "0ther"}))
    made = export(bench, source)
    bench.train()
    row = bench.row(made)
    assert (row.status, row.error["code"], row.error["param"]) == ("failed", "base_changed", "model")
    assert "0ther" in row.error["message"] and "c0ffee" in row.error["message"]
