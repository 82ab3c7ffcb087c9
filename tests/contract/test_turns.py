"""A claim looks at the heads of lines only, and yet takes the very job that comes first of all: decision 0007."""

from __future__ import annotations

import random

import pytest
from sqlalchemy import func, select, update

from common.db.engine import Sessions, clock, db_now
from common.db.rows import JobRow
from common.jobs import lifecycle, line, quotas
from tests.contract.test_lifecycle import PUBLISHED
from tests.contract.test_queue import Queue, crowd

BASES = ("org/a", "org/b")


@pytest.fixture
def queue(sessions: Sessions) -> Queue:
    return Queue(sessions)


def in_order(queue: Queue, held: str | None) -> list[str]:
    """Return the jobs that may be claimed, sorted as the decision says, each with each."""
    with queue.sessions.read() as session:
        rows = list(session.scalars(select(JobRow).where(JobRow.status == "queued")))
        now, places = clock(session), {}
        for tenant in {row.tenant for row in rows}:
            quota = quotas.read(session, tenant)
            used_s = line.held_s(tenant, db_now() - line.SHARE_S)
            share = session.scalar(select(func.round(used_s / 60)))
            full = quota.max_running is not None and quota.running >= quota.max_running
            spent = quota.max_gpu_hours is not None and quota.gpu_hours >= quota.max_gpu_hours
            if not full and not spent:
                places[tenant] = (quota.running, share)

    def key(row: JobRow) -> tuple[object, ...]:
        long_waited = row.queued_at < now - line.PREFER_HELD_BASE_S
        warmth = 0 if long_waited else 1 if row.base_id == held else 2
        return (-row.priority, *places[row.tenant], warmth, row.created_at, row.id)

    due = [row for row in rows if row.tenant in places and max(row.not_before, row.hold_until) <= now]
    return [row.id for row in sorted(due, key=key)]


@pytest.mark.parametrize("seed", range(5))
def test_a_claim_takes_the_first_of_all(queue: Queue, seed: int) -> None:
    rng = random.Random(seed)
    for job_id in crowd(queue, rng) + [queue.checked("d", priority=rng.randrange(-2, 3)) for _ in range(4)]:
        queue.edit(job_id, base_id=rng.choice(BASES))
        if rng.random() < 0.1:
            queue.edit(job_id, not_before=db_now() + 1000)
    claims, num_claimed = [], 0
    while expected := in_order(queue, held := rng.choice([None, *BASES])):
        claim = queue.claim("w", 600, held)
        assert claim.job_id == expected[0], (held, expected)
        claims.append(claim)
        num_claimed += 1
        if rng.random() < 0.4:
            queue.do(lifecycle.publish, claims.pop(rng.randrange(len(claims))), PUBLISHED, {})
    assert num_claimed >= 4 and queue.do(lifecycle.claim, "w", 600) is None


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_what_another_worker_is_about_to_take_is_passed_over(queue: Queue) -> None:
    made = [queue.checked(tenant) for tenant in ("a", "a", "a", "b", "b")]
    for place, job_id in enumerate(made):
        queue.age(job_id, 200 - place)
    # Young, so that it is the last of its line.
    last = queue.checked("b", base_id="org/held")
    held = [made[0], made[1], made[3], made[4]]
    with queue.sessions.write() as session:
        session.execute(select(JobRow.id).where(JobRow.id.in_(held)).with_for_update())
        assert [queue.claim(held="org/held").job_id for _ in range(2)] == [made[2], last]
        assert queue.do(lifecycle.claim, "w", 60) is None


def test_every_line_is_found_whatever_its_tenant_is_called(queue: Queue) -> None:
    names = ["a", "A", "ä", "a b", "aa", "Z", "~", "0", "日本"]
    made = {}
    for priority in (-100, 0, 100):
        for name in names:
            made[queue.checked(name, priority=priority)] = (name, priority)
    with queue.sessions.write() as session:
        session.execute(update(JobRow).values(created_at=JobRow.created_at - 1))
        found = session.execute(line.lines(None)).all()
    assert sorted((row.tenant, row.priority) for row in found) == sorted(made.values())
