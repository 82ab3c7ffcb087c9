"""What nobody asks for any more goes, the oldest first and a bounded number at once."""

from __future__ import annotations

from sqlalchemy import insert, select

from common.db.engine import Sessions, clock
from common.db.forgetting import removal
from common.db.rows import UsageRow

DAY_S = 86_400.0


def left(sessions: Sessions, most: int) -> list[str]:
    """Remove up to `most` rows older than a day and return the jobs of those that are left."""
    with sessions.write() as session:
        session.execute(removal(UsageRow.ended_at, DAY_S, most))
        return list(session.scalars(select(UsageRow.job_id).order_by(UsageRow.job_id)))


def filled(sessions: Sessions, days: dict[str, float]) -> None:
    """Store the use of workers by jobs that ended so many days ago."""
    with sessions.write() as session:
        now = clock(session)
        use = {"epoch": 1, "tenant": "t", "started_at": 0.0}
        rows = [use | {"job_id": job_id, "ended_at": now - DAY_S * age} for job_id, age in days.items()]
        session.execute(insert(UsageRow), rows)


def test_the_oldest_go_first_and_the_young_never(sessions: Sessions):
    filled(sessions, {"a": 2, "b": 4, "c": 3, "d": 0.5, "e": 1.5})
    assert left(sessions, 2) == ["a", "d", "e"]
    assert left(sessions, 2) == ["d"]
    assert left(sessions, 2) == ["d"]


def test_rows_of_one_moment_go_together(sessions: Sessions):
    filled(sessions, {"a": 2, "b": 2, "c": 2, "d": 0})
    assert left(sessions, 1) == ["d"]
