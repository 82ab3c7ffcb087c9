"""Rows of uploaded datasets: one object per content and tenant, any number of names for it.

The object is made before the row and removed with the last row that names it. Both ends lock the content, so that an
upload and a removal of the same content at the same moment leave a row with its object, or neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from common.clock import moment
from common.context import Context
from common.db.engine import clock, db_now
from common.db.locks import lock
from common.db.rows import DatasetRow, JobRow
from common.errors import InvalidInput, NotFound, WrongState
from common.ids import new_id
from common.jobs import states
from common.schemas.datasets import Dataset, DatasetList
from common.storage import keys

SCHEME = "dataset:"


@dataclass(frozen=True)
class Content:
    """A file to keep: its name, size in bytes, SHA-256, and for how many seconds; None: until it is deleted."""

    name: str
    bytes: int
    sha256: str
    lasts_s: int | None = None


def shown(row: DatasetRow) -> Dataset:
    """Return a dataset as it is shown."""
    return Dataset(
        id=row.id,
        name=row.name,
        bytes=row.bytes,
        sha256=row.sha256,
        uri=f"{SCHEME}{row.id}",
        created_at=moment(row.created_at),
    )


def add(context: Context, tenant: str, content: Content, put: Callable[[str], None]) -> tuple[DatasetRow, bool]:
    """Keep a file and return its row, and whether that is new. `put` writes the content to a key of the store.

    The same content under the same name has one row, which lasts as long as the longest of its uploads was meant to.
    """
    key = keys.dataset(tenant, content.sha256)
    if not _stored(context, key):
        put(key)
    with context.write() as session:
        lock(session, key)
        row, is_new = _insert(session, tenant, key, content)
        # Somebody may have deleted the same content since: under the lock that cannot happen any more.
        if not _stored(context, key):
            put(key)
        return row, is_new


def known(context: Context, tenant: str, content: Content) -> DatasetRow | None:
    """Return the row of a content that the tenant has, under the name given, or None where it must be sent.

    Raises:
        InvalidInput: the tenant has it, and its size is another one.
    """
    key = keys.dataset(tenant, content.sha256)
    with context.write() as session:
        lock(session, key)
        there = select(DatasetRow.bytes).where(DatasetRow.tenant == tenant, DatasetRow.key == key)
        num_bytes = session.scalar(there.limit(1))
        if num_bytes is None or not _stored(context, key):
            return None
        if num_bytes != content.bytes:
            raise InvalidInput(f"bytes: the content of this hash has {num_bytes} bytes", param="bytes")
        return _insert(session, tenant, key, content)[0]


def _stored(context: Context, key: str) -> bool:
    try:
        context.store.size(key)
    except NotFound:
        return False
    return True


def _insert(session: Session, tenant: str, key: str, content: Content) -> tuple[DatasetRow, bool]:
    now = clock(session)
    until = None if content.lasts_s is None else now + content.lasts_s
    same = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.key == key, DatasetRow.name == content.name)
    found = session.scalar(same.limit(1))
    if found is not None:
        if found.expires_at is not None:
            found.expires_at = None if until is None else max(until, found.expires_at)
        return found, False
    row = DatasetRow(
        id=new_id("ds"),
        tenant=tenant,
        name=content.name,
        key=key,
        bytes=content.bytes,
        sha256=content.sha256,
        created_at=now,
        expires_at=until,
    )
    session.add(row)
    session.flush()
    return row, True


def get(session: Session, tenant: str, dataset_id: str) -> DatasetRow:
    """Return the row of a dataset.

    Raises:
        NotFound: no such dataset in this tenant.
    """
    return _found(session, select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.id == dataset_id))


def keep(session: Session, tenant: str, dataset_id: str) -> DatasetRow:
    """Return the row of a dataset as `get` does, and keep it from being deleted until the transaction ends."""
    own = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.id == dataset_id)
    return _found(session, own.with_for_update(read=True))


def _found(session: Session, query: Select[Any]) -> DatasetRow:
    row: DatasetRow | None = session.scalar(query)
    if row is None:
        raise NotFound(
            "there is no such dataset",
            param="id",
            hint="`tunery datasets list` (GET /datasets) lists those of your key's tenant.",
        )
    return row


def page(session: Session, tenant: str, *, after: str | None = None, limit: int = 20) -> DatasetList:
    """Return datasets, newest first, that come after (are older than) the id `after`."""
    query = select(DatasetRow).where(DatasetRow.tenant == tenant)
    if after:
        query = query.where(DatasetRow.id < after)
    found = list(session.scalars(query.order_by(DatasetRow.id.desc()).limit(limit + 1)))
    data = [shown(row) for row in found[:limit]]
    more = len(found) > limit
    return DatasetList(data=data, has_more=more, next=data[-1].id if more else None)


def delete(session: Session, tenant: str, dataset_id: str) -> str | None:
    """Remove the row of a dataset; return the key of its object if no other row names it, for removal as well.

    Raises:
        NotFound: no such dataset in this tenant.
        WrongState: a job that has not ended reads it.
    """
    own = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.id == dataset_id)
    row = _found(session, own.with_for_update())
    lock(session, row.key)
    user = _live_user(session, tenant, dataset_id)
    if user is not None:
        raise WrongState(
            f"the dataset is used by the job {user}, which has not ended",
            code="dataset_in_use",
            param="id",
            hint="Cancel that job or wait for its end.",
        )
    session.delete(row)
    session.flush()
    others = session.scalar(select(func.count()).where(DatasetRow.tenant == tenant, DatasetRow.key == row.key))
    return None if others else row.key


def remove(context: Context, tenant: str, dataset_id: str) -> None:
    """Remove a dataset, and its object unless another dataset has the same content. Raises as `delete` does."""
    with context.write() as session:
        key = delete(session, tenant, dataset_id)
        if key is not None:
            # Within the transaction: if the store fails, the row stays and the call can be made again.
            context.store.delete([key])


def remove_unnamed(context: Context, key: str) -> bool:
    """Remove the object of a content that no dataset has; return whether that was so."""
    with context.write() as session:
        lock(session, key)
        if session.scalar(select(DatasetRow.id).where(DatasetRow.key == key).limit(1)) is not None:
            return False
        context.store.delete([key])
        return True


def _live_user(session: Session, tenant: str, dataset_id: str) -> str | None:
    """Return the id of a job that has not ended and names the dataset."""
    uri = f"{SCHEME}{dataset_id}"
    names_it = (JobRow.spec["dataset"].as_string() == uri) | (JobRow.spec["validation_dataset"].as_string() == uri)
    live = JobRow.status.not_in(states.TERMINAL)
    return session.scalar(select(JobRow.id).where(JobRow.tenant == tenant, live, names_it).limit(1))


def expired(session: Session) -> list[tuple[str, str]]:
    """Return (tenant, id) of the datasets whose time is over."""
    query = select(DatasetRow.tenant, DatasetRow.id).where(DatasetRow.expires_at < db_now())
    return [(tenant, dataset_id) for tenant, dataset_id in session.execute(query)]
