"""Rows against objects: which objects no row names, and which named objects are not there.

What an attempt uploads before it loses its lease, or a request before it breaks, belongs to nobody afterwards.
Everything under the prefix of a job that has not ended is in use; of an ended one its artifacts and checkpoints are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from common import datasets
from common.context import Context
from common.db.rows import ArtifactRow, CheckpointRow, DatasetRow, JobRow, UploadPartRow, UploadRow
from common.jobs import states
from common.storage import keys
from common.storage.store import StoredObject
from common.upload_rows import PENDING


@dataclass
class Findings:
    """What an audit found: objects that nothing names, and (job or dataset, key) that are named and not there."""

    orphans: list[StoredObject] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    num_objects: int = 0

    @property
    def orphan_bytes(self) -> int:
        """The size of all orphans in bytes."""
        return sum(item.bytes for item in self.orphans)


def audit(context: Context, *, with_missing: bool = True) -> Findings:
    """Compare the rows with the objects; reads only. Without `with_missing`, look for orphans alone."""
    found = Findings()
    with context.read() as session:
        awaited = _published(session) if with_missing else {}
        for owner, items in groupby(context.store.objects(""), key=lambda item: _owner(item.key)):
            used = _used(session, owner)
            for item in items:
                found.num_objects += 1
                awaited.pop(item.key, None)
                if not used(item.key):
                    found.orphans.append(item)
    found.missing = [(owner, key) for key, owner in awaited.items()]
    return found


def collect(context: Context, older_than_s: float) -> Findings:
    """Remove what nothing names and is older than `older_than_s`; return what was removed.

    The age protects what is being written: an upload's object is there before its row.
    """
    found = audit(context, with_missing=False)
    old = [item for item in found.orphans if item.age_s >= older_than_s]
    contents = [item for item in old if _is_content(item.key)]
    rest = [item for item in old if not _is_content(item.key)]
    # Of the same content there may be a row by now; of anything else that had none there never is one again.
    found.orphans = rest + [item for item in contents if datasets.remove_unnamed(context, item.key)]
    context.store.delete([item.key for item in rest])
    context.store.abort_uploads(older_than_s, _awaited(context))
    return found


def _waiting(column: Any) -> Select[Any]:
    """Return the query for a column of the uploads whose parts go straight to the store and still may."""
    return select(column).where(UploadRow.state == PENDING, UploadRow.store_upload.is_not(None))


def _awaited(context: Context) -> set[str]:
    with context.read() as session:
        return set(session.scalars(_waiting(UploadRow.store_upload)))


def _is_content(key: str) -> bool:
    return _owner(key).endswith("/datasets")


def _owner(key: str) -> str:
    """Return what a key belongs to: `tenant/datasets`, `tenant/uploads` or `tenant/job`."""
    return "/".join(key.split("/", 2)[:2])


class _Used:
    """Whether a key of one owner is named by a row."""

    def __init__(self, names: set[str], prefixes: tuple[str, ...] = ()):
        self._names = names
        self._prefixes = prefixes

    def __call__(self, key: str) -> bool:
        return key in self._names or key.startswith(self._prefixes)


def _used(session: Session, owner: str) -> _Used:
    tenant, _, name = owner.partition("/")
    if name == "datasets":
        return _Used(set(session.scalars(select(DatasetRow.key).where(DatasetRow.tenant == tenant))))
    if name == "uploads":
        parts = select(UploadPartRow.key).join(UploadRow).where(UploadRow.tenant == tenant)
        waiting = session.scalars(_waiting(UploadRow.id).where(UploadRow.tenant == tenant))
        return _Used({*session.scalars(parts), *(keys.whole_upload(tenant, upload_id) for upload_id in waiting)})
    job = session.execute(
        select(JobRow.status, JobRow.manifest_key).where(JobRow.tenant == tenant, JobRow.id == name)
    ).one_or_none()
    checkpoints = tuple(
        session.scalars(select(CheckpointRow.prefix).where(CheckpointRow.prefix.startswith(f"{owner}/")))
    )
    if job is None:
        # Deleted; a retry of it may still go on from its checkpoints.
        return _Used(set(), checkpoints)
    if job.status not in states.TERMINAL:
        return _Used(set(), (f"{owner}/",))
    names = set(session.scalars(select(ArtifactRow.key).where(ArtifactRow.job_id == name)))
    if job.manifest_key:
        names.add(job.manifest_key.removesuffix(keys.MANIFEST) + keys.ADAPTER_ARCHIVE)
    return _Used(names, checkpoints)


def _published(session: Session) -> dict[str, str]:
    """Return every key that a row promises, with the row's id."""
    promised: dict[str, str] = {}
    for table, owner in ((ArtifactRow, ArtifactRow.job_id), (DatasetRow, DatasetRow.id)):
        promised |= {key: str(name) for key, name in session.execute(select(table.key, owner))}
    return promised


def lines(found: Findings) -> Iterator[str]:
    """Yield the findings as text for people."""
    yield f"{found.num_objects} objects, {len(found.orphans)} named by nothing ({found.orphan_bytes} bytes)"
    yield from (f"orphan   {item.key}  {item.bytes} bytes, {item.age_s / 3600:.1f} h old" for item in found.orphans)
    yield from (f"missing  {key}  of {owner}" for owner, key in found.missing)
