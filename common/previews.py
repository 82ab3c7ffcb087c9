"""Previews are asked of preflight workers by a row: the API has no tokenizer, and must not run templates of strangers.

The same question by the same tenant is one row, which answers for a while. A worker that dies loses its lease, and the
next one takes the question; no answer of a lost lease is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from common.db.engine import clock, db_now
from common.db.locks import lock
from common.db.rows import PreviewRow
from common.errors import InfraError, InvalidInput, OverQuota
from common.jobs import doorbell
from common.jobs.line import NOTHING, turn
from common.schemas.previews import Preview, PreviewAsked

WAITING, READY, REFUSED, BROKEN = "waiting", "ready", "refused", "broken"
KEPT_S = 600.0
# What went wrong may be mended in a moment.
REFUSED_KEPT_S = 10.0
WAITING_MAX = 8
ATTEMPTS_MAX = 3
LEASE_S = 180.0


def ask(session: Session, tenant: str, asked: PreviewAsked) -> str:
    """Return the id of the preview that answers `asked`; a new question rings for a preflight worker.

    Raises:
        OverQuota: the tenant waits for many previews already.
    """
    values = asked.model_dump(mode="json")
    preview_id = hashlib.sha256(json.dumps([tenant, values], sort_keys=True).encode()).hexdigest()
    lock(session, f"preview {preview_id}")
    row = session.get(PreviewRow, preview_id)
    now = clock(session)
    if row is not None and row.expires_at > now:
        return preview_id
    if row is not None:
        session.delete(row)
        session.flush()
    waiting = select(func.count()).where(PreviewRow.tenant == tenant, PreviewRow.state == WAITING)
    if (session.scalar(waiting.where(PreviewRow.expires_at > now)) or 0) >= WAITING_MAX:
        raise OverQuota(f"{WAITING_MAX} previews wait already", code="too_many_previews", hint="Wait for one of them.")
    session.add(
        PreviewRow(id=preview_id, tenant=tenant, asked=values, state=WAITING, created_at=now, expires_at=now + KEPT_S)
    )
    doorbell.after_commit(session, doorbell.PREFLIGHT)
    return preview_id


def answered(session: Session, tenant: str, preview_id: str) -> Preview:
    """Return what is known: rows, or that they are still being made.

    Raises:
        InvalidInput: they cannot be made; it says why.
        InfraError: they could not be made now.
    """
    row = session.scalar(select(PreviewRow).where(PreviewRow.tenant == tenant, PreviewRow.id == preview_id))
    if row is None:
        raise InfraError("the preview was forgotten", code="preview_lost")
    result = row.result or {}
    if row.state == REFUSED:
        raise InvalidInput(result["message"], code=result["code"], param=result["param"], hint=result["hint"])
    if row.state == BROKEN:
        raise InfraError(result["message"], code=result["code"], hint=result["hint"])
    asked = {name: row.asked[name] for name in ("dataset", "model", "offset", "loss")}
    return Preview.model_validate({**asked, **result, "status": row.state})


def claim(session: Session, worker_id: str, spent: Mapping[str, int] = NOTHING) -> PreviewRow | None:
    """Take the next question that nobody answers, or return None.

    The tenant with the least of the worker's seconds in `spent` comes first, then age.
    """
    over = PreviewRow.lease_expires_at < db_now()
    died = {"code": "preview_died", "message": "the workers that made the preview died", "hint": None, "param": None}
    session.execute(
        update(PreviewRow)
        .where(PreviewRow.state == WAITING, PreviewRow.attempts >= ATTEMPTS_MAX, over)
        .values(state=BROKEN, result=died, expires_at=db_now() + REFUSED_KEPT_S)
    )
    free = or_(PreviewRow.lease_expires_at.is_(None), over)
    best = (
        select(PreviewRow.id)
        .where(PreviewRow.state == WAITING, PreviewRow.expires_at > db_now(), free)
        .order_by(turn(PreviewRow.tenant, spent), PreviewRow.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    preview_id = session.scalar(best)
    if preview_id is None:
        return None
    taken = {"worker_id": worker_id, "attempts": PreviewRow.attempts + 1, "lease_expires_at": db_now() + LEASE_S}
    session.execute(update(PreviewRow).where(PreviewRow.id == preview_id).values(taken))
    return session.get(PreviewRow, preview_id, populate_existing=True)


def num_free(session: Session, limit: int) -> int:
    """Return how many questions nobody answers, up to `limit`: their bell was lost, or their worker."""
    free = or_(PreviewRow.lease_expires_at.is_(None), PreviewRow.lease_expires_at < db_now())
    waiting = (PreviewRow.state == WAITING, PreviewRow.expires_at > db_now())
    return len(list(session.scalars(select(PreviewRow.id).where(*waiting, free).limit(limit))))


def settle(session: Session, row: PreviewRow, state: str, result: dict[str, Any]) -> None:
    """Keep the answer of the worker that holds the lease; one of a lost lease is passed over."""
    kept_s = KEPT_S if state == READY else REFUSED_KEPT_S
    own = (PreviewRow.id == row.id, PreviewRow.state == WAITING, PreviewRow.attempts == row.attempts)
    values = {"state": state, "result": result, "lease_expires_at": None, "expires_at": db_now() + kept_s}
    session.execute(update(PreviewRow).where(*own, PreviewRow.worker_id == row.worker_id).values(values))


def give_back(session: Session, row: PreviewRow) -> None:
    """Let another worker take the question at once."""
    own = (PreviewRow.id == row.id, PreviewRow.state == WAITING, PreviewRow.attempts == row.attempts)
    values = {"worker_id": None, "lease_expires_at": None, "attempts": row.attempts - 1}
    session.execute(update(PreviewRow).where(*own).values(values))


def forget(session: Session) -> None:
    """Remove the previews whose time is over."""
    session.execute(delete(PreviewRow).where(PreviewRow.expires_at < db_now()))
