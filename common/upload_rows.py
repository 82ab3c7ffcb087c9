"""What uploads in parts have in common, whether the parts come through the API or go straight to the store."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from common.context import Context
from common.db.engine import clock, db_now, once
from common.db.locks import lock
from common.db.rows import UploadRow
from common.errors import InvalidInput, NotFound, OverQuota, WrongState
from common.settings import Settings

PENDING, COMPLETED, CANCELLED, EXPIRED, FAILED = "pending", "completed", "cancelled", "expired", "failed"


def check_size(settings: Settings, num_bytes: int) -> None:
    """Raise InvalidInput for a file that is larger than a dataset may be."""
    most = settings.max_dataset_bytes
    if num_bytes > most:
        raise InvalidInput(
            f"bytes: a dataset may have {most} bytes",
            param="bytes",
            hint="Split it, or ask the operator about TUNERY_MAX_DATASET_BYTES.",
        )


def admit(session: Session, settings: Settings, tenant: str) -> None:
    """Raise OverQuota unless the tenant may begin one more upload. Nobody else does until the transaction ends."""
    lock(session, f"{tenant}/uploads")
    unfinished = (UploadRow.tenant == tenant, UploadRow.state == PENDING, UploadRow.expires_at >= once(db_now()))
    oldest = session.scalars(select(UploadRow).where(*unfinished).order_by(UploadRow.expires_at)).all()
    most = settings.max_unfinished_uploads
    if len(oldest) < most:
        return
    raise OverQuota(
        f"{len(oldest)} uploads of your tenant are unfinished, and {most} may be",
        code="quota_uploads",
        hint=f"Complete or cancel one, for instance {oldest[0].id} of {oldest[0].name!r}, or ask the operator for more "
        "(TUNERY_MAX_UNFINISHED_UPLOADS). One that nobody goes on with is given up by itself.",
    )


def own(tenant: str, upload_id: str, *, direct: bool) -> Select[UploadRow]:
    """Return the query for an upload of one kind: `direct` ones have their parts in the store itself."""
    return select(UploadRow).where(UploadRow.tenant == tenant, UploadRow.id == upload_id, _kind(direct))


def found(session: Session, query: Select[UploadRow]) -> UploadRow:
    """Return the row; raises NotFound."""
    row = session.scalar(query)
    if row is None:
        raise NotFound("there is no such upload", param="upload_id")
    return row


def state_of(session: Session, row: UploadRow) -> str:
    """Return the state of an upload now: one that waits for parts ends by itself."""
    return EXPIRED if row.state == PENDING and row.expires_at < clock(session) else row.state


def pending(session: Session, query: Select[UploadRow]) -> UploadRow:
    """Return the row of an upload that waits for its parts; raises NotFound and WrongState."""
    row = found(session, query)
    state = state_of(session, row)
    if state != PENDING:
        raise WrongState(f"the upload is {state}", code=f"upload_{state}", param="upload_id", hint="Begin another one.")
    return row


def over(context: Context, *, direct: bool) -> list[str]:
    """Return the ids of the uploads of one kind whose time is over."""
    with context.read() as session:
        return list(session.scalars(select(UploadRow.id).where(UploadRow.expires_at < db_now(), _kind(direct))))


def _kind(direct: bool) -> ColumnElement[bool]:
    return UploadRow.sha256.is_not(None) if direct else UploadRow.sha256.is_(None)
