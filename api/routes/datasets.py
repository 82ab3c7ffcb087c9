"""Datasets that are uploaded here."""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import uploads
from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading, WhoCalls
from api.documentation import FILE, form, problem_answers
from common import base_models, datasets, previews
from common.context import Context
from common.datasets import Content
from common.errors import InfraError
from common.keys import Caller
from common.schemas.datasets import Dataset, DatasetList
from common.schemas.previews import ROWS_MAX, Loss, Preview, PreviewAsked, PreviewOptions

router = APIRouter(
    prefix="/datasets", tags=["datasets"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)

_KNOWN: dict[int | str, dict[str, Any]] = {200: {"model": Dataset, "description": "The same file is there already."}}
_WAITING: dict[int | str, dict[str, Any]] = {202: {"model": Preview, "description": "It is still being made."}}
Wait = Annotated[int, Query(ge=0, le=60, description="Seconds to wait for a preflight worker's answer.")]
# A preview takes seconds, and few people wait for one.
_LOOK_S = 0.3
_FORM_DOC = form({"file": FILE}, required=["file"])


@router.post("", status_code=201, openapi_extra=_FORM_DOC, responses=_KNOWN | problem_answers(413))
async def upload_dataset(request: Request, response: Response, context: Installation, who: WhoCalls) -> Dataset:
    """Upload a JSONL, JSON, CSV or Parquet file. The same file again answers 200 and the dataset that is there."""
    try:
        with tempfile.TemporaryDirectory(prefix="tunery-upload-") as folder:
            path = Path(folder) / "file"
            upload = await uploads.receive(request, path, context.settings.max_upload_bytes)
            content = Content(upload.name, upload.bytes, upload.sha256)
            put = partial(context.store.put_file, path=path)
            row, is_new = await run_in_threadpool(datasets.add, context, who.tenant, content, put)
    except OSError as error:
        raise InfraError(f"the upload cannot be stored ({error.strerror})", code="disk") from error
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/datasets/{row.id}"
    return datasets.shown(row)


@router.get("")
def list_datasets(
    session: Reading,
    who: WhoCalls,
    after: Annotated[str | None, Query(pattern=r"^\w{1,40}$", description="The last page's `next`.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> DatasetList:
    """List datasets, newest first."""
    return datasets.page(session, who.tenant, after=after, limit=limit)


@router.get("/{dataset_id}/preview", responses=_WAITING | problem_answers(404, 429))
async def preview_dataset(
    dataset_id: str,
    response: Response,
    context: Installation,
    who: WhoCalls,
    model: Annotated[str, Query(min_length=1, max_length=200, description="The base model, as a job names it.")],
    rows: Annotated[int, Query(ge=1, le=ROWS_MAX)] = 5,
    offset: Annotated[int, Query(ge=0, le=10_000_000, description="Rows to pass over.")] = 0,
    max_length: Annotated[int | None, Query(ge=8, le=1_048_576, description="As in a job's hyperparameters.")] = None,
    loss: Annotated[Loss, Query(description="As in a job's hyperparameters.")] = "auto",
    wait: Wait = 20,
) -> Preview:
    """Show rows as the model will see them: by its chat template, token by token, with those that carry loss.

    A preflight worker makes it. 202: it has not yet; the same call asks again, and is answered for ten minutes.
    """
    asked = PreviewAsked(dataset=dataset_id, model=model, rows=rows, offset=offset, max_length=max_length, loss=loss)
    return await _preview(asked, wait, response, context, who)


@router.post("/{dataset_id}/preview", responses=_WAITING | problem_answers(404, 429))
async def preview_dataset_as_asked(
    dataset_id: str,
    body: PreviewOptions,
    response: Response,
    context: Installation,
    who: WhoCalls,
    wait: Wait = 20,
) -> Preview:
    """Show rows as the model will see them, also by a `chat_template` of the request, which no address has room for."""
    asked = PreviewAsked(dataset=dataset_id, **body.model_dump())
    return await _preview(asked, wait, response, context, who)


async def _preview(asked: PreviewAsked, wait: int, response: Response, context: Context, who: Caller) -> Preview:
    preview_id = await run_in_threadpool(_ask_preview, context, who.tenant, asked)
    pauses = max(1, round(wait / _LOOK_S))
    for _ in range(pauses):
        found = await run_in_threadpool(_look_at_preview, context, who.tenant, preview_id)
        if found.status == "ready" or not wait:
            break
        await asyncio.sleep(_LOOK_S)
    if found.status == "waiting":
        response.status_code = 202
        response.headers["Retry-After"] = "1"
    return found


def _ask_preview(context: Context, tenant: str, asked: PreviewAsked) -> str:
    with context.write() as session:
        datasets.get(session, tenant, asked.dataset)
        base_models.check(asked.model, context.settings)
        return previews.ask(session, tenant, asked)


def _look_at_preview(context: Context, tenant: str, preview_id: str) -> Preview:
    with context.read() as session:
        return previews.answered(session, tenant, preview_id)


@router.get("/{dataset_id}", responses=problem_answers(404))
def read_dataset(dataset_id: str, session: Reading, who: WhoCalls) -> Dataset:
    """Read what is known of a dataset."""
    return datasets.shown(datasets.get(session, who.tenant, dataset_id))


@router.delete("/{dataset_id}", status_code=204, responses=problem_answers(404, 409))
def delete_dataset(dataset_id: str, context: Installation, who: WhoCalls) -> None:
    """Delete a dataset, and its object unless another dataset has the same content."""
    datasets.remove(context, who.tenant, dataset_id)
