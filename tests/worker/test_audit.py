"""Objects and rows agree, or the audit says where they do not, and only what nobody needs is removed."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import delete, update

from common import datasets, removal
from common.audit import Findings, audit, collect
from common.db.rows import JobRow
from common.jobs import lifecycle
from common.storage import keys
from common.storage.store import PART_BYTES
from tests.worker.conftest import TENANT, Bench


def keys_of(bench: Bench) -> set[str]:
    """Return every key in the bucket."""
    return {item.key for item in bench.context.store.objects("")}


def test_a_quiet_installation_has_no_findings(bench: Bench):
    bench.submit(), bench.submit(fault="crash", fault_at=4)
    bench.check(), bench.train()
    found = audit(bench.context)
    assert (found.orphans, found.missing) == ([], []) and found.num_objects == len(keys_of(bench)) > 5


def test_the_prefix_of_a_losing_attempt_is_removed(bench: Bench):
    job_id = bench.submit()
    bench.check(), bench.train()
    kept = keys_of(bench)
    torn = keys.attempt(TENANT, job_id, 99)
    bench.context.store.put_bytes(f"{torn}adapter/adapter_model.safetensors", b"stale")
    bench.context.store.put_bytes(f"{torn}manifest.json", b"{}")
    assert {item.key for item in audit(bench.context).orphans} == keys_of(bench) - kept
    assert collect(bench.context, 3600).orphans == [] and keys_of(bench) != kept, "young objects stay"
    collect(bench.context, 0)
    assert keys_of(bench) == kept
    json.loads(bench.context.store.get_bytes(bench.row(job_id).manifest_key))


def test_nothing_of_a_job_that_lives_is_removed(bench: Bench):
    job_id = bench.submit()
    bench.check()
    key = f"{keys.attempt(TENANT, job_id, 1)}checkpoints/step-1/half.bin"
    bench.context.store.put_bytes(key, b"x")
    collect(bench.context, 0)
    assert key in keys_of(bench)


def test_the_checkpoints_of_a_failed_job_stay(bench: Bench):
    job_id = bench.submit(fault="diverge", fault_at=5)
    bench.check(), bench.train()
    before = keys_of(bench)
    assert any("/checkpoints/" in key for key in before) and bench.row(job_id).status == "failed"
    collect(bench.context, 0)
    assert keys_of(bench) == before


def test_what_was_left_by_deleted_jobs_and_broken_uploads_is_removed(bench: Bench, tmp_path):
    job_id = bench.submit()
    bench.check(), bench.train()
    with bench.context.write() as session:
        session.execute(delete(JobRow).where(JobRow.id == job_id))
    store = bench.context.store
    store.put_bytes(keys.dataset(TENANT, "0" * 64), b"its row was never written")
    client = store._client
    upload = client.create_multipart_upload(Bucket=store.bucket, Key="t/datasets/big")["UploadId"]
    client.upload_part(Bucket=store.bucket, Key="t/datasets/big", UploadId=upload, PartNumber=1, Body=b"x" * PART_BYTES)
    collect(bench.context, 0)
    assert [key for key in keys_of(bench) if job_id in key or key.endswith("0" * 64)] == []
    assert not client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")


def test_a_content_that_is_uploaded_again_while_its_orphan_is_collected_stays(bench: Bench, monkeypatch):
    content = datasets.Content("again.jsonl", 3, "1" * 64)
    key, store = keys.dataset(TENANT, content.sha256), bench.context.store
    store.put_bytes(key, b"its row was never written")

    def audit_and_upload(*arguments: Any, **options: Any) -> Findings:
        found = audit(*arguments, **options)
        assert [item.key for item in found.orphans] == [key]
        datasets.add(bench.context, TENANT, content, lambda to: store.put_bytes(to, b"new"))
        return found

    monkeypatch.setattr("common.audit.audit", audit_and_upload)
    assert collect(bench.context, 0).orphans == [] and store.size(key) > 0
    assert audit(bench.context).missing == []


def test_a_retry_goes_on_although_the_old_job_is_deleted(bench: Bench):
    failed = bench.submit(steps=10, fault="diverge", fault_at=6, fault_attempts=1)
    bench.check(), bench.train()
    with bench.context.write() as session:
        made = lifecycle.retry(session, TENANT, failed)
        session.execute(update(JobRow).where(JobRow.id == made).values(epoch=10))
    removal.remove(bench.context, TENANT, failed)
    collect(bench.context, 0)
    bench.check(), bench.train()
    assert bench.row(made).status == "succeeded" and "checkpoint.refused" not in bench.events(made)
    assert "job.restored" in bench.events(made)
    removal.remove(bench.context, TENANT, made)
    collect(bench.context, 0)
    assert not [key for key in keys_of(bench) if failed in key or made in key]


def test_a_lost_object_is_told(bench: Bench):
    job_id = bench.submit()
    bench.check(), bench.train()
    key = f"{keys.attempt(TENANT, job_id, bench.row(job_id).epoch)}adapter/adapter_model.safetensors"
    bench.context.store.delete([key])
    assert audit(bench.context).missing == [(job_id, key)]


def test_a_retried_job_goes_on_from_the_old_ones_checkpoints(bench: Bench):
    data = bench.dataset()
    quiet = bench.submit(data, steps=10)
    failed = bench.submit(data, steps=10, fault="diverge", fault_at=6, fault_attempts=1)
    bench.check(), bench.train()
    assert bench.row(failed).status == "failed"
    with bench.context.write() as session:
        made = lifecycle.retry(session, TENANT, failed)
    # The new job's first attempt is its second claim, which the fault's count leaves alone.
    bench.check()
    with bench.context.write() as session:
        session.execute(update(JobRow).where(JobRow.id == made).values(epoch=10))
    bench.train()
    assert bench.row(made).status == "succeeded" and bench.adapter(made) == bench.adapter(quiet)
    assert "job.restored" in bench.events(made)
    collect(bench.context, 0)
    assert audit(bench.context).missing == []
