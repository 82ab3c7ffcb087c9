"""Rows of workers: what each process says of itself, and who is still heard."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from common.clock import moment
from common.db.engine import clock, db_now
from common.db.rows import WorkerRow
from common.errors import NotFound
from common.schemas.workers import Worker

# A worker beats every BEAT_S; one that was not heard for SILENT_S is shown as gone, and its row leaves after FORGET_S.
BEAT_S = 5.0
SILENT_S = 30.0
FORGET_S = 86_400.0


@dataclass(frozen=True)
class Beat:
    """What a worker reports: its place, device, and what it is doing. `vram_bytes` is the card's whole memory.

    `free_bytes` is what others left of it when this worker last held nothing there.
    """

    id: str
    name: str
    kind: str
    device: str
    device_name: str | None
    vram_bytes: int | None
    state: str
    job_id: str | None = None
    base_model: str | None = None
    free_bytes: int | None = None


def beat(session: Session, report: Beat) -> str:
    """Write a worker's report and return what is wished of it: run or drain."""
    values = dict(vars(report)) | {"heartbeat_at": db_now()}
    changed = session.execute(
        update(WorkerRow).where(WorkerRow.id == report.id).values(values).returning(WorkerRow.desired)
    ).scalar_one_or_none()
    if changed is not None:
        return changed
    now = clock(session)
    session.add(WorkerRow(**vars(report), desired="run", started_at=now, heartbeat_at=now))
    return "run"


def leave(session: Session, worker_id: str) -> None:
    """Note that a worker has ended in good order."""
    session.execute(update(WorkerRow).where(WorkerRow.id == worker_id).values(state="gone", job_id=None))


def num_idle(session: Session, kind: str) -> int:
    """Return how many workers of a kind were heard lately and have nothing to do."""
    heard = WorkerRow.heartbeat_at > db_now() - SILENT_S
    count = select(func.count()).where(WorkerRow.kind == kind, WorkerRow.state == "idle", heard)
    return int(session.scalar(count) or 0)


def forget_silent(session: Session) -> None:
    """Remove the rows of workers that nobody has heard for a day."""
    session.execute(delete(WorkerRow).where(WorkerRow.heartbeat_at < db_now() - FORGET_S))


def listed(session: Session) -> list[Worker]:
    """Return every worker that was seen within a day, the latest heartbeat first."""
    query = select(WorkerRow, WorkerRow.heartbeat_at < db_now() - SILENT_S)
    found = session.execute(query.order_by(WorkerRow.heartbeat_at.desc(), WorkerRow.id))
    return [_shown(row, silent) for row, silent in found]


def drain(session: Session, worker_id: str) -> Worker:
    """Wish that a worker hands back or finishes its job and takes no other.

    Raises:
        NotFound: no such worker.
    """
    query = select(WorkerRow, WorkerRow.heartbeat_at < db_now() - SILENT_S).where(WorkerRow.id == worker_id)
    found = session.execute(query).one_or_none()
    if found is None:
        raise NotFound("there is no such worker", param="id", hint="`tunery workers` (GET /workers) lists them.")
    row, silent = found
    row.desired = "drain"
    session.flush()
    return _shown(row, silent)


def _shown(row: WorkerRow, silent: bool) -> Worker:
    gone = silent or row.state == "gone"
    state = "gone" if gone else "draining" if row.desired == "drain" else row.state
    return Worker(
        id=row.id,
        name=row.name,
        kind=row.kind,
        state=state,
        device=row.device,
        device_name=row.device_name,
        vram_bytes=row.vram_bytes,
        free_bytes=row.free_bytes,
        base_model=None if gone else row.base_model,
        job=None if gone else row.job_id,
        heartbeat_at=moment(row.heartbeat_at),
        started_at=moment(row.started_at),
    )
