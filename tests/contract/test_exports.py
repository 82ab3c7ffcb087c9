"""Merged models of finished jobs are jobs of their own, on every database."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import delete

from common.db.rows import JobRow
from common.errors import InvalidInput, NotFound, OverQuota, WrongState
from common.jobs import forecast, lifecycle, queries, quotas
from common.jobs.lifecycle import Published
from common.schemas.exports import ExportRequest
from common.schemas.jobs import JobSpec
from common.schemas.quotas import QuotaLimits
from tests.contract.test_lifecycle import INFRA, LIMITS, SPEC, Jobs, jobs

__all__ = ["jobs"]

MERGED = ExportRequest()


def published(*names: str) -> Published:
    files = [{"name": name, "key": f"k/{name}", "bytes": 1, "sha256": "f" * 64} for name in (*names, "manifest.json")]
    return Published("t/j/a2/manifest.json", "f" * 64, files)


def finished(jobs: Jobs, *names: str, **changes) -> str:
    """Return a job that published `names`."""
    claim = jobs.running(**changes)
    jobs.do(lifecycle.publish, claim, published("adapter/adapter_model.safetensors", *names), {"loss": 1.0})
    return claim.job_id


def export(jobs: Jobs, job_id: str, *forms: str, tenant: str = "t", **more) -> tuple[str, bool]:
    return jobs.do(lifecycle.export, tenant, job_id, ExportRequest(export=list(forms or ("merged",)), **more))


def names(jobs: Jobs, job_id: str) -> list[str]:
    with jobs.sessions.read() as session:
        return [row.name for row in queries.artifacts(session, job_id)]


def test_an_export_is_claimed_without_a_check_and_publishes_into_itself(jobs: Jobs):
    source = finished(jobs, base_id="org/pinned", metadata={"team": "red"})
    before = jobs.row(source)
    made, is_new = export(jobs, source, priority=3)
    row = jobs.row(made)
    assert is_new and made != source and jobs.do(lifecycle.claim_preflight, "p", 60) is None
    assert (row.status, row.source_job, row.spec["export"], row.priority) == ("queued", source, ["merged"], 3)
    assert (row.base_id, row.base_revision, row.dataset_sha256) == ("org/pinned", "c0ffee", "d" * 64)
    assert row.metadata_ == {"team": "red"} and row.hold_until == 0
    claim = jobs.claim()
    assert claim.job_id == made
    jobs.do(lifecycle.publish, claim, published("merged/config.json", "merged/README.md", "reports/report.json"), {})
    assert jobs.status(made) == "succeeded"
    after = jobs.row(source)
    assert (after.version, after.manifest_sha256) == (before.version, before.manifest_sha256), "the source is untouched"
    theirs = ["adapter/adapter_model.safetensors", "manifest.json"]
    assert names(jobs, source) == sorted([*theirs, "merged/README.md", "merged/config.json"])
    assert names(jobs, made) == ["manifest.json", "merged/README.md", "merged/config.json", "reports/report.json"]


def test_what_is_being_made_is_not_made_twice(jobs: Jobs):
    source = finished(jobs)
    first, _ = export(jobs, source)
    assert export(jobs, source) == (first, False), "while it waits"
    claim = jobs.claim()
    assert export(jobs, source) == (first, False), "while it runs"
    second, is_new = export(jobs, source, "merged", "merged_4bit")
    assert is_new and jobs.row(second).spec["export"] == ["merged_4bit"], "only what nobody makes"
    assert export(jobs, source, "merged_4bit", "merged") == (second, False)
    jobs.do(lifecycle.publish, claim, published("merged/config.json"), {})
    assert export(jobs, source) == (first, False), "nor when it is there"


def test_nor_what_the_job_itself_published(jobs: Jobs):
    source = finished(jobs, "merged/config.json")
    assert export(jobs, source) == (source, False)
    made, is_new = export(jobs, source, "merged", "merged_4bit")
    assert is_new and jobs.row(made).spec["export"] == ["merged_4bit"]


def test_what_was_given_up_is_made_anew(jobs: Jobs):
    source = finished(jobs)
    waiting, _ = export(jobs, source)
    jobs.do(lifecycle.request_cancel, "t", waiting)
    failing, is_new = export(jobs, source)
    assert is_new
    jobs.do(lifecycle.fail, jobs.claim(), INFRA)
    stopping, is_new = export(jobs, source)
    assert is_new and jobs.claim().job_id == stopping
    jobs.do(lifecycle.request_cancel, "t", stopping)
    again = jobs.do(lifecycle.retry, "t", failing)
    assert again != stopping and jobs.row(again).source_job == source and jobs.status(again) == "queued"
    assert jobs.do(lifecycle.retry, "t", failing) == again


def test_files_of_two_exports_of_one_form_are_never_mixed(jobs: Jobs):
    source = finished(jobs)
    first, _ = export(jobs, source)
    late = jobs.claim()
    jobs.do(lifecycle.request_cancel, "t", first)
    second, is_new = export(jobs, source)
    assert is_new
    jobs.do(lifecycle.publish, jobs.claim(), published("merged/config.json", "merged/z"), {})
    jobs.do(lifecycle.publish, late, published("merged/a", "merged/config.json"), {})
    assert {jobs.status(first), jobs.status(second)} == {"succeeded"}
    adapter = "adapter/adapter_model.safetensors"
    assert names(jobs, source) == [adapter, "manifest.json", "merged/a", "merged/config.json"]
    assert names(jobs, second) == ["manifest.json", "merged/config.json", "merged/z"]


def test_two_that_ask_at_once_get_one_job(jobs: Jobs):
    source, made = finished(jobs), []
    barrier = threading.Barrier(4)

    def ask() -> None:
        barrier.wait()
        made.append(export(jobs, source))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job_id for job_id, _ in made}) == 1 and sum(is_new for _, is_new in made) == 1


def test_an_export_is_lost_and_claimed_again(jobs: Jobs):
    source = finished(jobs)
    made, _ = export(jobs, source)
    first = jobs.claim()
    jobs.end_lease(made)
    assert jobs.expire(made) == "queued"
    second = jobs.claim("other")
    assert (second.job_id, second.epoch) == (made, first.epoch + 1)
    assert jobs.do(lifecycle.fault, second, INFRA, LIMITS) == "queued"


def test_it_waits_in_the_tenants_quota(jobs: Jobs):
    source = finished(jobs)
    limits = QuotaLimits(max_running=None, max_queued=1, max_gpu_hours=None, max_priority=0)
    jobs.do(quotas.write, "t", limits)
    with pytest.raises(InvalidInput, match="priority"):
        export(jobs, source, priority=1)
    first, _ = export(jobs, source)
    assert export(jobs, source) == (first, False), "no new job, no quota"
    with pytest.raises(OverQuota):
        export(jobs, source, "merged_4bit")


UNFIT = {
    "running": lambda jobs: jobs.running().job_id,
    "waiting": lambda jobs: jobs.checked(),
    "full": lambda jobs: finished(jobs, **full()),
    "an export": lambda jobs: export(jobs, finished(jobs))[0],
}


def full() -> dict:
    spec = JobSpec.model_validate({"model": SPEC.model, "dataset": SPEC.dataset, "method": "full"})
    return {name: getattr(spec, name) for name in ("method", "lora", "quantization", "export", "hyperparameters")}


@pytest.mark.parametrize("make", UNFIT.values(), ids=UNFIT)
def test_what_has_no_adapter_cannot_be_exported(jobs: Jobs, make):
    job_id = make(jobs)
    with pytest.raises(WrongState) as refusal:
        export(jobs, job_id)
    assert refusal.value.code in ("cannot_export", "no_adapter") and refusal.value.hint
    with pytest.raises(NotFound):
        export(jobs, job_id, tenant="stranger")


def test_a_16_bit_job_has_nothing_to_dequantise(jobs: Jobs):
    source = finished(jobs, method="lora", quantization=None)
    with pytest.raises(InvalidInput, match="merged_dequantized") as refusal:
        export(jobs, source, "merged_dequantized")
    assert refusal.value.param == "export"


def test_an_export_that_has_not_ended_is_known_and_one_that_has_outlives_its_source(jobs: Jobs):
    source = finished(jobs)
    made, _ = export(jobs, source)
    assert jobs.do(queries.unfinished_export, source) == made
    jobs.do(lifecycle.publish, jobs.claim(), published("merged/config.json"), {})
    assert jobs.do(queries.unfinished_export, source) is None
    with jobs.sessions.write() as session:
        session.execute(delete(JobRow).where(JobRow.id == source))
    assert jobs.row(made).source_job == source and "merged/config.json" in names(jobs, made)


def test_an_export_is_no_adapter_to_serve_and_no_measure_of_speed(jobs: Jobs):
    claim = jobs.running()
    jobs.do(lifecycle.publish, claim, published(), {"tokens_per_s": 10.0, "train_s": 1.0})
    for form in ("merged", "merged_dequantized", "merged_4bit"):
        export(jobs, claim.job_id, form)
        jobs.do(
            lifecycle.publish, jobs.claim(), published(f"{form}/config.json"), {"tokens_per_s": 1.0, "train_s": 0.1}
        )
    with jobs.sessions.read() as session:
        served = queries.succeeded_over(session, "t", "org/base", "c0ffee")
        assert [job.id for job in served] == [claim.job_id]
        assert forecast.speeds(session, ["org/base"])["org/base"].tokens_per_s == 10.0
