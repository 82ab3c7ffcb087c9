"""Datasets that are uploaded here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import uploads
from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading, WhoCalls
from api.documentation import problem_answers
from api.uploads import Upload
from common import datasets
from common.context import Context
from common.db.locks import lock
from common.errors import InfraError, NotFound
from common.schemas.datasets import Dataset, DatasetList
from common.storage import keys

router = APIRouter(
    prefix="/datasets", tags=["datasets"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)

_KNOWN: dict[int | str, dict[str, Any]] = {200: {"model": Dataset, "description": "The same file is there already."}}
_FORM_DOC: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary", "minLength": 1}},
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post("", status_code=201, openapi_extra=_FORM_DOC, responses=_KNOWN | problem_answers(413))
async def upload_dataset(request: Request, response: Response, context: Installation, who: WhoCalls) -> Dataset:
    """Upload a JSONL, JSON, CSV or Parquet file. The same file again answers 200 and the dataset that is there."""
    try:
        with tempfile.TemporaryDirectory(prefix="tunery-upload-") as folder:
            path = Path(folder) / "file"
            upload = await uploads.receive(request, path, context.settings.max_upload_bytes)
            dataset, is_new = await run_in_threadpool(_keep, context, who.tenant, upload, path)
    except OSError as error:
        raise InfraError(f"the upload cannot be stored ({error.strerror})", code="disk") from error
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return dataset


def _keep(context: Context, tenant: str, upload: Upload, path: Path) -> tuple[Dataset, bool]:
    key = keys.dataset(tenant, upload.sha256)
    if not _stored(context, key):
        context.store.put_file(key, path)
    with context.write() as session:
        lock(session, key)
        row, is_new = datasets.insert(
            session, tenant, name=upload.name, key=key, num_bytes=upload.bytes, sha256=upload.sha256
        )
        # Somebody may have deleted the same content since: under the lock that cannot happen any more.
        if not _stored(context, key):
            context.store.put_file(key, path)
        return datasets.shown(row), is_new


def _stored(context: Context, key: str) -> bool:
    try:
        context.store.size(key)
    except NotFound:
        return False
    return True


@router.get("")
def list_datasets(
    session: Reading,
    who: WhoCalls,
    after: Annotated[str | None, Query(pattern=r"^\w{1,40}$", description="The last page's `next`.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> DatasetList:
    """List datasets, newest first."""
    return datasets.page(session, who.tenant, after=after, limit=limit)


@router.get("/{dataset_id}", responses=problem_answers(404))
def read_dataset(dataset_id: str, session: Reading, who: WhoCalls) -> Dataset:
    """Read what is known of a dataset."""
    return datasets.shown(datasets.get(session, who.tenant, dataset_id))


@router.delete("/{dataset_id}", status_code=204, responses=problem_answers(404, 409))
def delete_dataset(dataset_id: str, context: Installation, who: WhoCalls) -> None:
    """Delete a dataset, and its object unless another dataset has the same content."""
    with context.write() as session:
        key = datasets.delete(session, who.tenant, dataset_id)
        if key is not None:
            # Within the transaction: if the store fails, the row stays and the call can be made again.
            context.store.delete([key])
