"""Large files whose parts go straight to the object store by signed links, and whose content is verified at the end.

They are put together under a key of the upload's own, read once for their hash, and copied by the store to where their
content belongs: until then nobody else sees a byte of them. Each step can be done twice, so that a call that broke off
is made again, and two callers at once get the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy import select
from sqlalchemy.orm import Session

from common import datasets, upload_rows
from common.context import Context
from common.datasets import Content
from common.db.engine import clock, db_now
from common.db.locks import lock
from common.db.rows import DatasetRow, UploadRow
from common.errors import InfraError, InvalidInput, NotFound, OverQuota, WrongState
from common.ids import new_id
from common.schemas.uploads import PartLink, PartLinkList, UploadPart
from common.storage import keys
from common.storage.parts import PARTS_MAX, StoredPart
from common.storage.store import Store
from common.upload_rows import CANCELLED, COMPLETED, FAILED, PENDING

_MIB = 2**20


@dataclass(frozen=True)
class Standing:
    """An upload, its state now, the numbers of the parts that have arrived, and what it became."""

    row: UploadRow
    state: str
    arrived: list[int]
    dataset: DatasetRow | None = None


def part(row: UploadRow, number: int) -> UploadPart:
    """Return which bytes of the file the part `number` has."""
    size = row.part_bytes or row.bytes
    offset = (number - 1) * size
    return UploadPart(number=number, offset=offset, bytes=min(size, row.bytes - offset))


def num_parts(row: UploadRow) -> int:
    """Return how many parts the file has."""
    return -(-row.bytes // (row.part_bytes or row.bytes))


def begin(context: Context, tenant: str, content: Content) -> tuple[Standing, bool]:
    """Begin an upload, or find the unfinished one of the same content; return it and whether it is new.

    It is completed at once where the tenant has the content.

    Raises:
        InvalidInput: the tenant has the content, and it is not so long.
        OverQuota: as many uploads of the tenant are unfinished as may be.
    """
    dataset = datasets.known(context, tenant, content)
    if dataset is not None:
        row = _new(context, tenant, content)
        row.state, row.dataset_id = COMPLETED, dataset.id
        with context.write() as session:
            _insert(context, session, row)
        return Standing(row, COMPLETED, _all(row), dataset), False
    with context.write() as session:
        row_found = _resume(context, session, tenant, content)
    if row_found is not None:
        try:
            return Standing(row_found, PENDING, _arrived(context.store, row_found)), False
        except WrongState:
            _end(context, row_found, CANCELLED)
    return _begin_new(context, tenant, content)


def _begin_new(context: Context, tenant: str, content: Content) -> tuple[Standing, bool]:
    row = _new(context, tenant, content)
    key = keys.whole_upload(tenant, row.id)
    row.store_upload = context.store.begin_parts(key)
    try:
        with context.write() as session:
            other = _resume(context, session, tenant, content)
            if other is None:
                upload_rows.admit(session, context.settings, tenant)
                _insert(context, session, row)
                return Standing(row, PENDING, []), True
    except OverQuota:
        context.store.abort_parts(key, row.store_upload)
        raise
    context.store.abort_parts(key, row.store_upload)
    return Standing(other, PENDING, _arrived(context.store, other)), False


def _new(context: Context, tenant: str, content: Content) -> UploadRow:
    # Rounded up, so that what an operator sees in the bucket are whole mebibytes.
    least = -(-content.bytes // PARTS_MAX)
    size = max(context.settings.upload_part_bytes, -(-least // _MIB) * _MIB)
    return UploadRow(
        id=new_id("upload"),
        tenant=tenant,
        name=content.name,
        bytes=content.bytes,
        sha256=content.sha256,
        part_bytes=size,
        state=PENDING,
    )


def _insert(context: Context, session: Session, row: UploadRow) -> None:
    row.created_at = clock(session)
    row.expires_at = row.created_at + context.settings.upload_idle_s
    session.add(row)
    session.flush()


def _resume(context: Context, session: Session, tenant: str, content: Content) -> UploadRow | None:
    """Return the unfinished upload of a content, from now on under the name that it was begun with last."""
    lock(session, f"{tenant}/uploads/{content.sha256}")
    same = (UploadRow.tenant == tenant, UploadRow.sha256 == content.sha256, UploadRow.bytes == content.bytes)
    waits = (UploadRow.state == PENDING, UploadRow.expires_at >= db_now())
    row = session.scalar(select(UploadRow).where(*same, *waits).limit(1).with_for_update())
    if row is not None:
        row.name = content.name
        _touch(context, session, row)
    return row


def _touch(context: Context, session: Session, row: UploadRow) -> None:
    row.expires_at = clock(session) + context.settings.upload_idle_s


def read(context: Context, tenant: str, upload_id: str) -> Standing:
    """Return how far an upload is. Raises NotFound."""
    own = upload_rows.own(tenant, upload_id, direct=True)
    for last in (False, True):
        with context.read() as session:
            row = upload_rows.found(session, own)
            state = upload_rows.state_of(session, row)
            if row.state == COMPLETED:
                return Standing(row, state, _all(row), _dataset(session, row))
        if state != PENDING:
            return Standing(row, state, [])
        try:
            return Standing(row, state, _arrived(context.store, row))
        except WrongState:
            # It may have been completed since its row was read: once more.
            if last:
                raise
    raise AssertionError


def _dataset(session: Session, row: UploadRow) -> DatasetRow | None:
    try:
        return datasets.get(session, row.tenant, row.dataset_id or "")
    except NotFound:
        return None


def links(context: Context, tenant: str, upload_id: str, *, after: int, limit: int) -> PartLinkList:
    """Return signed links for parts that have not arrived, of those behind the number `after`.

    Raises:
        NotFound: no such upload in this tenant.
        WrongState: it waits for no parts any more.
    """
    with context.write() as session:
        row = upload_rows.pending(session, upload_rows.own(tenant, upload_id, direct=True).with_for_update())
        _touch(context, session, row)
    there = set(_arrived(context.store, row))
    missing = [number for number in range(after + 1, num_parts(row) + 1) if number not in there]
    key, upload = keys.whole_upload(tenant, row.id), row.store_upload or ""
    page = [part(row, number) for number in missing[:limit]]
    data = [
        PartLink(**item.model_dump(), url=context.store.part_link(key, upload, item.number, item.bytes))
        for item in page
    ]
    more = len(missing) > limit
    return PartLinkList(data=data, has_more=more, next=data[-1].number if more else None)


def complete(context: Context, tenant: str, upload_id: str, is_stopped: Callable[[], bool] = lambda: False) -> Standing:
    """Put an upload together, verify it, and keep it as a dataset. Once more is no error.

    Reading a large one takes minutes; it ends early once `is_stopped()`.

    Raises:
        NotFound: no such upload in this tenant.
        WrongState: parts have not arrived, or it was cancelled or has expired.
        InvalidInput: what arrived is not what was announced. Nothing of it is kept.
        InfraError: the store is away, or this process stops. Everything is kept, and the call can be made again.
    """
    try:
        return _completed(context, tenant, upload_id) or _complete(context, tenant, upload_id, is_stopped)
    except (NotFound, WrongState, InfraError):
        # Another call may have ended it meanwhile, and removed what this one was reading.
        done = _completed(context, tenant, upload_id)
        if done is None:
            raise
        return done


def _completed(context: Context, tenant: str, upload_id: str) -> Standing | None:
    """Return an upload that is complete; None for one that is not yet. Raises InvalidInput for one that failed."""
    with context.read() as session:
        row = upload_rows.found(session, upload_rows.own(tenant, upload_id, direct=True))
        if row.state == FAILED:
            raise _wrong_content()
        if row.state != COMPLETED:
            return None
        return Standing(row, COMPLETED, _all(row), datasets.get(session, tenant, row.dataset_id or ""))


def _complete(context: Context, tenant: str, upload_id: str, is_stopped: Callable[[], bool]) -> Standing:
    own, key = upload_rows.own(tenant, upload_id, direct=True), keys.whole_upload(tenant, upload_id)
    with context.write() as session:
        row = upload_rows.pending(session, own.with_for_update())
        _touch(context, session, row)
    _join(context.store, row)
    if context.store.size(key) != row.bytes or _sha256(context.store, key, is_stopped) != row.sha256:
        _end(context, row, FAILED)
        raise _wrong_content()
    content = Content(row.name, row.bytes, row.sha256)
    dataset, _ = datasets.add(context, tenant, content, partial(context.store.copy, key))
    with context.write() as session:
        row = upload_rows.found(session, own.with_for_update())
        if row.state != COMPLETED:
            row = upload_rows.pending(session, own)
        row.state, row.dataset_id = COMPLETED, dataset.id
    context.store.delete([key])
    return Standing(row, COMPLETED, _all(row), dataset)


def _wrong_content() -> InvalidInput:
    return InvalidInput(
        "sha256: what arrived has another SHA-256 than was announced",
        code="hash_mismatch",
        param="sha256",
        hint="The file may have changed meanwhile. Begin again with the hash that it has now.",
    )


def _sha256(store: Store, key: str, is_stopped: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    for chunk in store.chunks(key):
        if is_stopped():
            raise InfraError("the server stops while it verifies the upload", code="stopping", hint="Call it again.")
        digest.update(chunk)
    return digest.hexdigest()


def _join(store: Store, row: UploadRow) -> None:
    """Make the parts one object, unless an earlier call has done it."""
    key, upload = keys.whole_upload(row.tenant, row.id), row.store_upload or ""
    try:
        there = store.parts(key, upload)
        store.join_parts(key, upload, _whole(row, there))
    except NotFound:
        _require_joined(store, key)


def _whole(row: UploadRow, there: list[StoredPart]) -> list[StoredPart]:
    """Return every part of the file. Raises WrongState where one is missing."""
    right = {item.number: item for item in there if item.bytes == part(row, item.number).bytes}
    missing = [number for number in range(1, num_parts(row) + 1) if number not in right]
    if missing:
        raise WrongState(
            f"parts: {len(missing)} of {num_parts(row)} have not arrived, the first is {missing[0]}",
            code="parts_missing",
            param="parts",
            hint="GET /uploads/{id}/parts has links for them.",
        )
    return list(right.values())


def _arrived(store: Store, row: UploadRow) -> list[int]:
    """Return the numbers of the parts that lie in the store. Raises WrongState where it has lost the upload."""
    key = keys.whole_upload(row.tenant, row.id)
    try:
        there = store.parts(key, row.store_upload or "")
    except NotFound:
        _require_joined(store, key)
        return _all(row)
    return [item.number for item in there if item.bytes == part(row, item.number).bytes]


def _require_joined(store: Store, key: str) -> None:
    try:
        store.size(key)
    except NotFound as error:
        raise WrongState(
            "the object store has ended the upload", code="upload_lost", param="upload_id", hint="Begin another one."
        ) from error


def _all(row: UploadRow) -> list[int]:
    return list(range(1, num_parts(row) + 1))


def cancel(context: Context, tenant: str, upload_id: str) -> None:
    """Give an upload up; its parts go. Once more is no error.

    Raises:
        NotFound: no such upload in this tenant.
        WrongState: it is complete, or has expired.
    """
    with context.read() as session:
        row = upload_rows.found(session, upload_rows.own(tenant, upload_id, direct=True))
        if row.state != CANCELLED:
            row = upload_rows.pending(session, upload_rows.own(tenant, upload_id, direct=True))
    if not _end(context, row, CANCELLED):
        raise WrongState("the upload is completed", code="upload_completed", param="upload_id")


def _end(context: Context, row: UploadRow, state: str) -> bool:
    """Let an upload come to nothing, with everything that it put into the store; return False where it is complete."""
    with context.write() as session:
        now = upload_rows.found(session, upload_rows.own(row.tenant, row.id, direct=True).with_for_update())
        if now.state == COMPLETED:
            return False
        if now.state == PENDING:
            now.state = state
    _remove_objects(context.store, row)
    return True


def _remove_objects(store: Store, row: UploadRow) -> None:
    key = keys.whole_upload(row.tenant, row.id)
    if row.store_upload:
        store.abort_parts(key, row.store_upload)
    store.delete([key])


def remove_expired(context: Context) -> None:
    """Remove the uploads that nobody has asked for in a long time, with what they put into the store."""
    for upload_id in upload_rows.over(context, direct=True):
        with context.write() as session:
            # Its client may have come back since.
            late = select(UploadRow).where(UploadRow.id == upload_id, UploadRow.expires_at < db_now())
            row = session.scalar(late.with_for_update())
            if row is None:
                continue
            session.delete(row)
        _remove_objects(context.store, row)
