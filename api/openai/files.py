"""`/v1/files`: datasets, and the metrics of succeeded jobs."""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from api import uploads
from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading, WhoCalls
from api.documentation import FILE, form, openai_answers
from api.openai.values import After, Deleted, ExpiresAfter, Page, check_purpose, ends
from common import datasets, files
from common.context import Context
from common.datasets import Content
from common.errors import InfraError, InvalidInput
from common.files import File
from common.keys import Caller

router = APIRouter(
    prefix="/files", tags=["openai: files"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)

_EXPIRES = {"expires_after[anchor]": "anchor", "expires_after[seconds]": "seconds"}
_FORM_DOC = form(
    {
        "file": FILE,
        "purpose": {"type": "string", "enum": ["fine-tune"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
    required=["file", "purpose"],
)
_CONTENT_DOC: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The content",
        "content": {kind: {"schema": {"type": "string"}} for kind in ("application/octet-stream", "text/csv")},
    }
}


class FileObject(BaseModel):
    """A file. `bytes` is its size; times are whole seconds since the epoch."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"] = "processed"
    status_details: str | None = None


class FilePage(Page):
    """A page of files."""

    data: list[FileObject]


def shown(file: File) -> FileObject:
    """Return a file as OpenAI's clients read it."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=None if file.expires_at is None else int(file.expires_at),
        filename=file.name,
        purpose=file.purpose,
    )


@router.post("", openapi_extra=_FORM_DOC, responses=openai_answers(413))
async def create_file(request: Request, context: Installation, who: WhoCalls) -> FileObject:
    """Upload a dataset: JSONL, JSON, CSV or Parquet. The same file again is the file that is there."""
    try:
        with tempfile.TemporaryDirectory(prefix="tunery-upload-") as folder:
            path = Path(folder) / "file"
            limit_bytes = context.settings.max_upload_bytes
            upload = await uploads.receive(request, path, limit_bytes, texts={"purpose", *_EXPIRES})
            lasts_s = _asked(upload.texts)
            content = Content(upload.name, upload.bytes, upload.sha256, lasts_s)
            return await run_in_threadpool(_add, context, who, content, path)
    except OSError as error:
        raise InfraError(f"the upload cannot be stored ({error.strerror})", code="disk") from error


def _asked(texts: dict[str, str]) -> int | None:
    """Check the texts of the form and return for how long the file is to be kept, in seconds."""
    if "purpose" not in texts:
        raise InvalidInput("purpose: is required", param="purpose", hint='Use "fine-tune".')
    check_purpose(texts["purpose"])
    expires: dict[str, Any] = {field: texts[name] for name, field in _EXPIRES.items() if name in texts}
    if not expires:
        return None
    if expires.get("seconds", "").isdecimal():
        expires["seconds"] = int(expires["seconds"])
    try:
        return ExpiresAfter.model_validate(expires).seconds
    except ValidationError as error:
        problems = [{**each, "loc": ("body", "expires_after", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(problems, body={"expires_after": expires}) from error


def _add(context: Context, who: Caller, content: Content, path: Path) -> FileObject:
    row, _ = datasets.add(context, who.tenant, content, partial(context.store.put_file, path=path))
    with context.read() as session:
        return shown(files.get(session, who.tenant, row.id))


@router.get("")
def list_files(
    session: Reading,
    who: WhoCalls,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FilePage:
    """List files, newest first."""
    found, more = files.page(
        session, who.tenant, purpose=purpose, after=after, limit=limit, newest_first=order == "desc"
    )
    data = [shown(file) for file in found]
    return FilePage(data=data, has_more=more, **ends([file.id for file in found]))


@router.get("/{file_id}", responses=openai_answers(404))
def read_file(file_id: str, session: Reading, who: WhoCalls) -> FileObject:
    """Read what is known of a file."""
    return shown(files.get(session, who.tenant, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=_CONTENT_DOC | openai_answers(404))
def read_file_content(file_id: str, context: Installation, session: Reading, who: WhoCalls) -> StreamingResponse:
    """Download a file."""
    file = files.get(session, who.tenant, file_id)
    chunks = context.store.chunks(file.key)
    # The first one now: a store that is away must be an error, and not an answer that breaks off.
    first = next(chunks, b"")
    headers = {
        "Content-Length": str(file.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name, safe='')}",
    }
    kind = "text/csv" if file.purpose == "fine-tune-results" else "application/octet-stream"
    return StreamingResponse(chain([first], chunks), headers=headers, media_type=kind)


@router.delete("/{file_id}", responses=openai_answers(404))
def delete_file(file_id: str, context: Installation, who: WhoCalls) -> Deleted:
    """Delete an uploaded file, unless a job that has not ended reads it."""
    files.delete(context, who.tenant, file_id)
    return Deleted(id=file_id, object="file")
