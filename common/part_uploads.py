"""Files that arrive in parts: announced, sent part by part in any order, and put together once.

Each part is an object of its own. The whole is read through twice, for its hashes and into its place, and never lies on
this machine's disk.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session

from common import datasets
from common.context import Context
from common.datasets import Content
from common.db.engine import clock
from common.db.rows import DatasetRow, UploadPartRow, UploadRow
from common.errors import InvalidInput
from common.ids import new_id
from common.settings import Settings
from common.storage import keys
from common.storage.store import Store
from common.upload_rows import CANCELLED, COMPLETED, PENDING, admit, found, over, own, pending

LASTS_S = 3600
PART_BYTES_MAX = 64 * 2**20


def create(
    session: Session, settings: Settings, tenant: str, *, name: str, num_bytes: int, lasts_s: int | None
) -> UploadRow:
    """Insert an upload that waits for its parts; raises OverQuota where too many do."""
    admit(session, settings, tenant)
    began = clock(session)
    row = UploadRow(
        id=new_id("upload"),
        tenant=tenant,
        name=name,
        bytes=num_bytes,
        lasts_s=lasts_s,
        state=PENDING,
        created_at=began,
        expires_at=began + LASTS_S,
    )
    session.add(row)
    session.flush()
    return row


def add_part(context: Context, tenant: str, upload_id: str, path: Path) -> UploadPartRow:
    """Keep the file at `path` as a part of an upload.

    Raises:
        NotFound: no such upload in this tenant.
        WrongState: it waits for no parts any more.
        InvalidInput: there are far more bytes than were announced.
    """
    with context.read() as session:
        pending(session, _own(tenant, upload_id))
    part_id, num_bytes = new_id("part"), path.stat().st_size
    key = keys.upload_part(tenant, upload_id, part_id)
    context.store.put_file(key, path)
    with context.write() as session:
        # Of an upload that has ended meanwhile, or was never to be so long, the object is collected later.
        upload = pending(session, _own(tenant, upload_id).with_for_update())
        there = session.scalar(select(func.sum(UploadPartRow.bytes)).where(UploadPartRow.upload_id == upload_id)) or 0
        # Clients send a part again whose answer was lost, so there may be more than the whole needs.
        if there + num_bytes > 2 * upload.bytes + PART_BYTES_MAX:
            raise InvalidInput(f"data: {upload.bytes} bytes were announced, and this is far more", param="data")
        row = UploadPartRow(id=part_id, upload_id=upload_id, key=key, bytes=num_bytes, created_at=clock(session))
        session.add(row)
    return row


def complete(
    context: Context, tenant: str, upload_id: str, part_ids: Sequence[str], md5: str | None
) -> tuple[UploadRow, DatasetRow]:
    """Put an upload together in the order of `part_ids`; return it and the file. Once more is no error.

    Raises:
        NotFound: no such upload in this tenant.
        WrongState: it was cancelled or has expired.
        InvalidInput: the parts are not its parts, or not what was announced.
    """
    with context.read() as session:
        upload = found(session, _own(tenant, upload_id))
        if upload.state == COMPLETED and upload.dataset_id:
            return upload, datasets.get(session, tenant, upload.dataset_id)
        upload = pending(session, _own(tenant, upload_id))
        parts = _ordered(session, upload, part_ids)
    content = _examined(context.store, upload, parts, md5)
    dataset, _ = datasets.add(
        context, tenant, content, lambda key: context.store.put_stream(key, _stream(context.store, parts))
    )
    with context.write() as session:
        upload = found(session, _own(tenant, upload_id).with_for_update())
        if upload.state != COMPLETED:
            upload = pending(session, _own(tenant, upload_id))
        upload.state, upload.dataset_id = COMPLETED, dataset.id
        left = _take_parts(session, upload_id)
    context.store.delete(left)
    return upload, dataset


def cancel(context: Context, tenant: str, upload_id: str) -> UploadRow:
    """Give an upload up; its parts go. Once more is no error.

    Raises:
        NotFound: no such upload in this tenant.
        WrongState: it is complete, or has expired.
    """
    with context.write() as session:
        upload = found(session, _own(tenant, upload_id).with_for_update())
        if upload.state == CANCELLED:
            return upload
        upload = pending(session, _own(tenant, upload_id))
        upload.state = CANCELLED
        left = _take_parts(session, upload_id)
    context.store.delete(left)
    return upload


def remove_expired(context: Context) -> None:
    """Remove the uploads whose hour is over, with their parts."""
    for upload_id in over(context, direct=False):
        with context.write() as session:
            left = _take_parts(session, upload_id)
            session.execute(delete(UploadRow).where(UploadRow.id == upload_id))
        context.store.delete(left)


def _own(tenant: str, upload_id: str) -> Select[UploadRow]:
    return own(tenant, upload_id, direct=False)


def _ordered(session: Session, upload: UploadRow, part_ids: Sequence[str]) -> list[UploadPartRow]:
    known = {row.id: row for row in session.scalars(select(UploadPartRow).where(UploadPartRow.upload_id == upload.id))}
    strange = [part_id for part_id in part_ids if part_id not in known]
    if strange or len(set(part_ids)) != len(part_ids):
        what = f"{strange[0][:64]!r} is no part of this upload" if strange else "a part is named twice"
        raise InvalidInput(f"part_ids: {what}", param="part_ids")
    return [known[part_id] for part_id in part_ids]


def _examined(store: Store, upload: UploadRow, parts: Sequence[UploadPartRow], md5: str | None) -> Content:
    num_bytes = sum(part.bytes for part in parts)
    if num_bytes != upload.bytes:
        raise InvalidInput(
            f"part_ids: the parts have {num_bytes} bytes, and {upload.bytes} were announced", param="part_ids"
        )
    ours, theirs = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    for chunk in _chunks(store, parts):
        ours.update(chunk)
        theirs.update(chunk)
    if md5 is not None and md5.lower() != theirs.hexdigest():
        raise InvalidInput(f"md5: what arrived has the MD5 {theirs.hexdigest()}", param="md5", hint="Send it again.")
    return Content(upload.name, num_bytes, ours.hexdigest(), upload.lasts_s)


def _take_parts(session: Session, upload_id: str) -> list[str]:
    """Remove the rows of an upload's parts and return the keys of their objects."""
    own = UploadPartRow.upload_id == upload_id
    left = list(session.scalars(select(UploadPartRow.key).where(own)))
    session.execute(delete(UploadPartRow).where(own))
    return left


def _chunks(store: Store, parts: Iterable[UploadPartRow]) -> Iterator[bytes]:
    return chain.from_iterable(store.chunks(part.key) for part in parts)


def _stream(store: Store, parts: Iterable[UploadPartRow]) -> io.BufferedReader:
    return io.BufferedReader(_Joined(_chunks(store, parts)))


class _Joined(io.RawIOBase):
    """Chunks of bytes as one stream."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` with what is next; return how many bytes, 0 at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        taken = min(len(buffer), len(self._rest))
        buffer[:taken] = self._rest[:taken]
        self._rest = self._rest[taken:]
        return taken
