"""`/v1/uploads`: files that arrive in parts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from api import uploads
from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, WhoCalls, Writing
from api.documentation import FILE, form, openai_answers
from api.openai import files as file_routes
from api.openai.files import FileObject
from api.openai.values import ExpiresAfter, check_purpose
from common import files, part_uploads
from common.db.rows import UploadRow
from common.errors import InfraError
from common.schemas.values import Strict, Text
from common.upload_rows import check_size

router = APIRouter(
    prefix="/uploads", tags=["openai: files"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)

_PART_DOC = form({"data": FILE}, required=["data"])


class UploadCreate(Strict):
    """The body of `POST /v1/uploads`. `bytes` is the size of the whole; the MIME type is passed over."""

    purpose: Text
    filename: Annotated[Text, Field(min_length=1, max_length=512)]
    bytes: Annotated[int, Field(ge=1, le=2**53)]
    mime_type: Annotated[Text, Field(max_length=255)]
    expires_after: ExpiresAfter | None = None


class UploadComplete(Strict):
    """The body of `POST /v1/uploads/{id}/complete`: the parts in the order of the file."""

    part_ids: Annotated[list[Text], Field(min_length=1, max_length=100_000)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class UploadObject(BaseModel):
    """An upload; `file` is what it became."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class PartObject(BaseModel):
    """One part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def shown(row: UploadRow, file: FileObject | None = None) -> UploadObject:
    """Return an upload as OpenAI's clients read it."""
    return UploadObject(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=int(row.expires_at),
        filename=row.name,
        status=row.state,
        file=file,
    )


@router.post("", responses=openai_answers(413, 415, 429))
def create_upload(body: UploadCreate, context: Installation, session: Writing, who: WhoCalls) -> UploadObject:
    """Announce a file that will arrive in parts, within an hour."""
    check_purpose(body.purpose)
    check_size(context.settings, body.bytes)
    lasts_s = body.expires_after.seconds if body.expires_after else None
    settings, name = context.settings, uploads.plain_name(body.filename)
    return shown(part_uploads.create(session, settings, who.tenant, name=name, num_bytes=body.bytes, lasts_s=lasts_s))


@router.post("/{upload_id}/parts", openapi_extra=_PART_DOC, responses=openai_answers(404, 413))
async def add_upload_part(upload_id: str, request: Request, context: Installation, who: WhoCalls) -> PartObject:
    """Send a part of at most 64 MiB. Parts may come in any order, and at once."""
    try:
        with tempfile.TemporaryDirectory(prefix="tunery-part-") as folder:
            path = Path(folder) / "part"
            await uploads.receive(request, path, part_uploads.PART_BYTES_MAX, name="data")
            row = await run_in_threadpool(part_uploads.add_part, context, who.tenant, upload_id, path)
    except OSError as error:
        raise InfraError(f"the part cannot be stored ({error.strerror})", code="disk") from error
    return PartObject(id=row.id, created_at=int(row.created_at), upload_id=upload_id)


@router.post("/{upload_id}/complete", responses=openai_answers(404, 413, 415))
def complete_upload(upload_id: str, body: UploadComplete, context: Installation, who: WhoCalls) -> UploadObject:
    """Put the parts together, in the order of `part_ids`."""
    row, dataset = part_uploads.complete(context, who.tenant, upload_id, body.part_ids, body.md5)
    with context.read() as session:
        return shown(row, file_routes.shown(files.get(session, who.tenant, dataset.id)))


@router.post("/{upload_id}/cancel", responses=openai_answers(404))
def cancel_upload(upload_id: str, context: Installation, who: WhoCalls) -> UploadObject:
    """Give an upload up. Its parts are removed."""
    return shown(part_uploads.cancel(context, who.tenant, upload_id))
