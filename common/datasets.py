"""Rows of uploaded datasets: one object per content and tenant, any number of names for it.

The object is made before the row and removed with the last row that names it. Both ends lock the content, so that an
upload and a removal of the same content at the same moment leave a row with its object, or neither.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from common.clock import moment
from common.db.engine import db_now
from common.db.locks import lock
from common.db.rows import DatasetRow, JobRow
from common.errors import NotFound, WrongState
from common.ids import new_id
from common.jobs import states
from common.schemas.datasets import Dataset, DatasetList

SCHEME = "dataset:"


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


def insert(
    session: Session, tenant: str, *, name: str, key: str, num_bytes: int, sha256: str
) -> tuple[DatasetRow, bool]:
    """Return the row for an upload, and whether it is new: the same content under the same name has one row."""
    same = select(DatasetRow).where(DatasetRow.tenant == tenant, DatasetRow.key == key, DatasetRow.name == name)
    found = session.scalar(same.limit(1))
    if found is not None:
        return found, False
    row = DatasetRow(
        id=new_id("ds"),
        tenant=tenant,
        name=name,
        key=key,
        bytes=num_bytes,
        sha256=sha256,
        created_at=session.scalar(select(db_now())),
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
        raise NotFound("there is no such dataset", param="id", hint="GET /datasets lists those of your key's tenant.")
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


def _live_user(session: Session, tenant: str, dataset_id: str) -> str | None:
    """Return the id of a job that has not ended and names the dataset."""
    uri = f"{SCHEME}{dataset_id}"
    names_it = (JobRow.spec["dataset"].as_string() == uri) | (JobRow.spec["validation_dataset"].as_string() == uri)
    live = JobRow.status.not_in(states.TERMINAL)
    return session.scalar(select(JobRow.id).where(JobRow.tenant == tenant, live, names_it).limit(1))
