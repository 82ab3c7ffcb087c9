"""The checker finds each kind of wrong that it is there for: a judge that cannot condemn would prove nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from sqlalchemy import text

from common.jobs import lifecycle
from tests.faults.judged import TENANT, Judged


def sql(judged: Judged, statement: str, **values: object) -> None:
    with judged.bench.context.write() as session:
        session.execute(text(statement), values)


def tampered_store(judged: Judged, name: str, body: bytes) -> None:
    (job,) = judged.checker().rows.values()
    prefix = job["manifest_key"].removesuffix("manifest.json")
    judged.bench.context.store.put_bytes(prefix + name, body)


def told_again(judged: Judged) -> None:
    entry = json.loads(judged.journal.path.read_text().splitlines()[0])
    judged.journal.write(
        "accepted", **{name: entry[name] for name in entry if name not in ("at", "kind")} | {"job": "x"}
    )


def computed_late(judged: Judged) -> None:
    """As if the first attempt had gone on after the next had begun."""
    (job_id,) = judged.checker().rows
    sql(judged, "UPDATE jobs SET status = 'queued', epoch = epoch + 1")
    with judged.trail.open("a") as trail:
        trail.write(f"{time.time() + 1:.6f} {job_id} 2 step 3 0\n")


TAMPERINGS: dict[str, tuple[str, str, Callable[[Judged], object]]] = {
    "no row": ("lost", "has no row", lambda j: sql(j, "DELETE FROM jobs")),
    "still running": ("lost", "is running at the end", lambda j: sql(j, "UPDATE jobs SET status = 'running'")),
    "a lease after the end": ("lost", "still leased", lambda j: sql(j, "UPDATE jobs SET worker_id = 'w'")),
    "failed for nothing": (
        "lost", "failed", lambda j: sql(j, "UPDATE jobs SET status = 'failed', error = '{\"code\": \"x\"}'"),
    ),
    "nobody's job": ("doubled", "never answered", lambda j: j.bench.submit()),
    "two jobs for one request": ("doubled", "made 2 jobs", told_again),
    "ended twice": (
        "doubled", "ended 2 times",
        lambda j: [sql(j, "UPDATE jobs SET status = 'queued'"), sql(j, "UPDATE jobs SET status = 'succeeded'")],
    ),
    "told of twice": (
        "doubled", "tells of its end 2 times",
        lambda j: sql(j, "UPDATE job_events SET name = 'job.failed' WHERE name = 'job.claimed'"),
    ),
    "another adapter": (
        "wrong", "the adapter is not", lambda j: tampered_store(j, "adapter/adapter_model.safetensors", b"0" * 64),
    ),
    "another file": ("wrong", "is not what the manifest says", lambda j: tampered_store(j, "adapter.tar.gz", b"x")),
    "another manifest": ("wrong", "not the one of the row", lambda j: tampered_store(j, "manifest.json", b"{}")),
    "another artifact": (
        "wrong", "not what the manifest lists",
        lambda j: sql(j, "UPDATE artifacts SET sha256 = 'x' WHERE name LIKE 'adapter%'"),
    ),
    "another attempt's manifest": ("wrong", "and ended in attempt", lambda j: sql(j, "UPDATE jobs SET epoch = 9")),
    "a hole in the sequence": (
        "wrong", "are numbered", lambda j: sql(j, "DELETE FROM job_events WHERE name = 'job.claimed'"),
    ),
    "a wrong step": (
        "wrong", "computed something else",
        lambda j: j.trail.write_text(j.trail.read_text().replace(" step 4 ", " step 4 f")),
    ),
    "a change after the end": ("stale", "after its end", lambda j: sql(j, "UPDATE jobs SET step = 1")),
    "a stale metric": (
        "stale", "a metric of an attempt",
        lambda j: sql(j, "INSERT INTO metrics SELECT id, 999, 0, epoch - 1, 1, 'train', '{}' FROM jobs"),
    ),
    "a stale checkpoint": (
        "stale", "a checkpoint of an attempt",
        lambda j: sql(j, "INSERT INTO checkpoints SELECT id, epoch, 99, 'p', 'x', 1, 0 FROM jobs"),
    ),
    "a late step": ("stale", "after the next had begun", computed_late),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_ending_is_condemned(judged: Judged, name: str):
    judged.submit()
    judged.finish()
    assert judged.verdict().clean, judged.verdict()
    kind, words, tamper = TAMPERINGS[name]
    tamper(judged)
    sentences = getattr(judged.verdict(), kind)
    assert any(words in sentence for sentence in sentences), judged.verdict()


LIVE_TAMPERINGS = {
    "an edge that does not exist": "UPDATE jobs SET status = 'validating'",
    "an epoch that does not rise": "UPDATE jobs SET epoch = epoch + 2, worker_id = 'x'",
    "the end of an attempt whose lease had ended": "UPDATE jobs SET status = 'failed'",
    "a renewal of a lease that had ended": "UPDATE jobs SET lease_expires_at = lease_expires_at + 100",
}


@pytest.mark.parametrize("words", LIVE_TAMPERINGS)
def test_a_write_without_a_lease_is_condemned(judged: Judged, words: str):
    judged.submit()
    judged.bench.check()
    with judged.bench.context.write() as session:
        assert lifecycle.claim(session, "w", -10.0) is not None
    assert not judged.verdict().stale
    sql(judged, LIVE_TAMPERINGS[words])
    assert any(words in sentence for sentence in judged.verdict().stale), judged.verdict()


def test_a_job_that_must_fail_and_does_not_is_condemned(judged: Judged):
    judged.submit(code="diverged")
    judged.submit(code="diverged", fault="bad_input", fault_at=2)
    judged.finish()
    wrong = judged.verdict().wrong
    assert any("succeeded" in each for each in wrong) and any("should fail with diverged" in each for each in wrong)


def test_a_cancelled_job_is_no_loss(judged: Judged):
    job_id = judged.submit()
    with judged.bench.context.write() as session:
        lifecycle.request_cancel(session, TENANT, job_id)
    assert judged.verdict().clean
