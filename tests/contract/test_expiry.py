"""A site that loses all its workers at once: their leases end together, and each job as it would alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import delete, event, func, insert, select
from sqlalchemy.orm import Session

from common import context as contexts
from common.context import Context
from common.db.engine import Sessions, clock
from common.db.rows import EventRow, UsageRow
from common.jobs import lifecycle
from common.jobs.lifecycle import Claim
from tests.contract.test_lifecycle import PUBLISHED
from tests.contract.test_outbox import Hooks
from worker import sweeper
from worker.sweeper import Sweeper


@pytest.fixture
def context(database_url: str, make_settings: Callable) -> Iterator[Context]:
    parts = contexts.build(make_settings(database_url))
    yield parts
    parts.close()


@pytest.fixture
def site(sessions: Sessions) -> Hooks:
    return Hooks(sessions)


def lost(site: Hooks, count: int) -> list[Claim]:
    """Let so many workers take a job each and fall silent."""
    claims = [site.running() for _ in range(count)]
    for claim in claims:
        site.end_lease(claim.job_id)
    return claims


def poisoned(site: Hooks, job_id: str) -> None:
    """Take the number of the job's next event, as no writer would: whatever is to happen to it fails."""
    values = {"seq": site.row(job_id).seq + 1, "name": "x", "level": "info", "message": "x", "data": {}}
    with site.sessions.write() as session:
        session.execute(insert(EventRow).values(job_id=job_id, at=clock(session), **values))


def test_each_job_goes_where_it_would_alone(site: Hooks) -> None:
    hook = site.hook()
    runs, pauses, cancelled, ended, alive = (site.running() for _ in range(5))
    site.do(lifecycle.pause, "t", pauses.job_id)
    site.do(lifecycle.request_cancel, "t", cancelled.job_id)
    site.do(lifecycle.publish, ended, PUBLISHED, {})
    site.submit()
    checked = site.do(lifecycle.claim_preflight, "checker", 60)
    late = (runs, pauses, cancelled, checked)
    for claim in late:
        site.end_lease(claim.job_id)
    told, everybody = len(site.told(hook)), [claim.job_id for claim in (*late, ended, alive)]
    before = {job_id: site.row(job_id) for job_id in everybody}
    with site.sessions.read() as session:
        used = session.scalar(select(func.count()).select_from(UsageRow))
    assert site.do(lifecycle.expire, everybody) == {
        runs.job_id: "queued", pauses.job_id: "paused", cancelled.job_id: "cancelled", checked.job_id: "validating",
    }  # fmt: skip
    for job_id in everybody:
        row, old = site.row(job_id), before[job_id]
        changed = int(job_id not in (ended.job_id, alive.job_id))
        assert (row.epoch, row.seq, row.version) == (old.epoch, old.seq + changed, old.version + changed)
        assert (row.worker_id is None) == (job_id != alive.job_id)
        assert (row.finished_at is not None) == (row.status in ("cancelled", "succeeded"))
    assert [site.events(claim.job_id)[-1] for claim in late] == [
        "job.lease_expired", "job.paused", "job.cancelled", "job.lease_expired",
    ]  # fmt: skip
    # A check keeps its state, and holds no GPU worker.
    assert len(site.told(hook)) == told + 3
    with site.sessions.read() as session:
        assert session.scalar(select(func.count()).select_from(UsageRow)) == used + 3
    assert site.do(lifecycle.expire, everybody) == {}


def test_many_leases_take_no_more_statements_than_few(site: Hooks) -> None:
    site.hook()
    engine, sent = site.sessions.engine, []
    event.listen(engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[2]))
    counts = []
    for count in (2, 30):
        ids = [claim.job_id for claim in lost(site, count)]
        sent.clear()
        assert len(site.do(lifecycle.expire, ids)) == count
        counts.append(len(sent))
    assert counts[0] == counts[1], sent


def test_a_sweep_ends_more_leases_than_a_transaction_holds(
    site: Hooks, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "EXPIRE_MOST", 3)
    expire, sizes = lifecycle.expire, []

    def noted(session: Session, job_ids: list[str]) -> dict[str, str]:
        sizes.append(len(job_ids))
        return expire(session, job_ids)

    monkeypatch.setattr(lifecycle, "expire", noted)
    claims = lost(site, 7)
    Sweeper(context).sweep()
    assert {site.status(claim.job_id) for claim in claims} == {"queued"} and sizes == [3, 3, 1]


def test_a_row_that_cannot_be_changed_keeps_no_other_job_from_its_end(site: Hooks, context: Context) -> None:
    claims = lost(site, 6)
    bad = claims[2].job_id
    poisoned(site, bad)
    version = site.row(bad).version
    Sweeper(context).sweep()
    found = {claim.job_id: site.status(claim.job_id) for claim in claims}
    assert found == {claim.job_id: "queued" for claim in claims} | {bad: "running"}
    assert site.row(bad).version == version
    with site.sessions.write() as session:
        session.execute(delete(EventRow).where(EventRow.job_id == bad, EventRow.name == "x"))
    Sweeper(context).sweep()
    assert site.status(bad) == "queued"
