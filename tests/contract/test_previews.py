"""Questions for previews on every database: asked once, answered by one worker, forgotten in time."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from common import previews
from common.db.engine import Sessions, db_now
from common.db.rows import PreviewRow
from common.errors import InfraError, InvalidInput, OverQuota
from common.schemas.previews import PreviewAsked

READY = {"base_revision": None, "max_length": 64, "template": "base", "rows": [], "problems": [], "has_more": False}


def ask(sessions: Sessions, tenant: str = "t", **changes: object) -> str:
    asked = PreviewAsked.model_validate({"dataset": "ds_1", "model": "tiny", **changes})
    with sessions.write() as session:
        return previews.ask(session, tenant, asked)


def claim(sessions: Sessions, worker: str = "w") -> PreviewRow | None:
    with sessions.write() as session:
        return previews.claim(session, worker)


def settle(sessions: Sessions, row: PreviewRow, state: str, result: dict[str, object]) -> None:
    with sessions.write() as session:
        previews.settle(session, row, state, result)


def status(sessions: Sessions, preview_id: str, tenant: str = "t") -> str:
    with sessions.read() as session:
        return previews.answered(session, tenant, preview_id).status


def late(sessions: Sessions, **columns: float) -> None:
    with sessions.write() as session:
        session.execute(update(PreviewRow).values({name: db_now() - ago for name, ago in columns.items()}))


def test_a_question_is_asked_once_and_answered_by_one(sessions: Sessions):
    preview_id = ask(sessions)
    assert ask(sessions) == preview_id and ask(sessions, tenant="u") != preview_id
    assert ask(sessions, rows=6) != preview_id
    assert status(sessions, preview_id) == "waiting"
    taken = [claim(sessions, worker) for worker in "abc"]
    assert len({row.id for row in taken if row}) == 3 and claim(sessions) is None
    mine = next(row for row in taken if row and row.id == preview_id)
    settle(sessions, mine, previews.READY, READY)
    assert status(sessions, preview_id) == "ready"
    with pytest.raises(InfraError):
        status(sessions, preview_id, tenant="u")


def test_an_answer_of_a_lost_lease_is_passed_over(sessions: Sessions):
    preview_id = ask(sessions)
    lost = claim(sessions, "dies")
    assert lost is not None
    late(sessions, lease_expires_at=1)
    again = claim(sessions, "lives")
    assert again is not None and again.attempts == 2
    settle(sessions, lost, previews.READY, READY)
    assert status(sessions, preview_id) == "waiting"
    with sessions.write() as session:
        previews.give_back(session, again)
    assert claim(sessions, "next") is not None


def test_workers_that_die_of_it_end_it(sessions: Sessions):
    preview_id = ask(sessions)
    for _ in range(previews.ATTEMPTS_MAX):
        assert claim(sessions) is not None
        late(sessions, lease_expires_at=1)
    assert claim(sessions) is None
    with pytest.raises(InfraError, match="died"):
        status(sessions, preview_id)


def test_a_refusal_says_why_and_may_be_asked_again_soon(sessions: Sessions):
    preview_id = ask(sessions)
    row = claim(sessions)
    assert row is not None
    settle(sessions, row, previews.REFUSED, {"code": "c", "message": "m", "hint": "h", "param": "model"})
    with pytest.raises(InvalidInput, match="m") as caught:
        status(sessions, preview_id)
    assert (caught.value.code, caught.value.param, caught.value.hint) == ("c", "model", "h")
    late(sessions, expires_at=1)
    assert ask(sessions) == preview_id and status(sessions, preview_id) == "waiting"


def test_a_tenant_has_so_many_waiting_and_all_are_forgotten(sessions: Sessions):
    for offset in range(previews.WAITING_MAX):
        ask(sessions, offset=offset)
    with pytest.raises(OverQuota):
        ask(sessions, offset=99)
    ask(sessions, tenant="u")
    late(sessions, expires_at=1)
    assert claim(sessions) is None
    with sessions.write() as session:
        previews.forget(session)
        assert session.query(PreviewRow).count() == 0


def test_a_tenant_that_had_its_share_comes_after_the_others(sessions: Sessions):
    ask(sessions, "slow")
    other = ask(sessions, "quick")
    with sessions.write() as session:
        first = previews.claim(session, "w", {"slow": 30})
    assert first is not None and first.id == other
