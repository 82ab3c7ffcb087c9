"""Large files: begun here, sent straight to the object store by signed links, and completed here."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import uploads
from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, WhoCalls
from api.documentation import problem_answers
from api.finishing import Finishing
from common import datasets, direct_uploads
from common.clock import moment
from common.datasets import Content
from common.direct_uploads import Standing
from common.schemas.uploads import PARTS_PER_PAGE, PartLinkList, Upload, UploadBegin
from common.upload_rows import check_size

router = APIRouter(prefix="/uploads", tags=["datasets"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)])

_KNOWN: dict[int | str, dict[str, Any]] = {
    200: {"model": Upload, "description": "The content is there already, or an unfinished upload of it."}
}
_WORKING: dict[int | str, dict[str, Any]] = {202: {"model": Upload, "description": "It is still being verified."}}


def shown(standing: Standing) -> Upload:
    """Return an upload as it is shown."""
    row = standing.row
    return Upload(
        id=row.id,
        status=standing.state,
        name=row.name,
        bytes=row.bytes,
        sha256=row.sha256,
        part_bytes=row.part_bytes,
        num_parts=direct_uploads.num_parts(row),
        parts=[direct_uploads.part(row, number) for number in standing.arrived],
        dataset=datasets.shown(standing.dataset) if standing.dataset else None,
        created_at=moment(row.created_at),
        expires_at=moment(row.expires_at),
    )


@router.post("", status_code=201, responses=_KNOWN | problem_answers(413, 415, 429))
def begin_upload(body: UploadBegin, response: Response, context: Installation, who: WhoCalls) -> Upload:
    """Begin the upload of a large file, or go on with one that was not finished: `parts` says what is there.

    Of content that is there already, nothing is sent: the upload is `completed` at once and names its `dataset`.
    """
    check_size(context.settings, body.bytes)
    content = Content(uploads.plain_name(body.name), body.bytes, body.sha256.lower())
    standing, is_new = direct_uploads.begin(context, who.tenant, content)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/uploads/{standing.row.id}"
    return shown(standing)


@router.get("/{upload_id}", responses=problem_answers(404, 409))
def read_upload(upload_id: str, context: Installation, who: WhoCalls) -> Upload:
    """Read how far an upload is. `parts` are those that lie in the object store."""
    return shown(direct_uploads.read(context, who.tenant, upload_id))


@router.get("/{upload_id}/parts", responses=problem_answers(404, 409))
def link_upload_parts(
    upload_id: str,
    context: Installation,
    who: WhoCalls,
    after: Annotated[int, Query(ge=0, le=10_000, description="The last page's `next`.")] = 0,
    limit: Annotated[int, Query(ge=1, le=PARTS_PER_PAGE)] = 20,
) -> PartLinkList:
    """List the parts that have not arrived, each with a signed link that takes its bytes by PUT.

    A link lasts for TUNERY_LINK_S; ask again for another. Asking keeps the upload alive.
    """
    return direct_uploads.links(context, who.tenant, upload_id, after=after, limit=limit)


@router.post("/{upload_id}/complete", responses=_WORKING | problem_answers(404, 409))
async def finish_upload(
    upload_id: str,
    request: Request,
    response: Response,
    context: Installation,
    who: WhoCalls,
    wait: Annotated[int, Query(ge=0, le=60, description="Seconds to wait for the verification.")] = 20,
) -> Upload:
    """Put the parts together and verify size and hash; then the file is a dataset like any other.

    202: it is not done yet; the same call asks again. What is not as announced is refused, and nothing of it is kept.
    """
    finishing: Finishing = request.app.state.finishing
    standing = await finishing.finish(who.tenant, upload_id, wait)
    if standing is None:
        standing = await run_in_threadpool(direct_uploads.read, context, who.tenant, upload_id)
    if standing.dataset is None:
        response.status_code = 202
        response.headers["Retry-After"] = "1"
    return shown(standing)


@router.delete("/{upload_id}", status_code=204, responses=problem_answers(404, 409))
def delete_upload(upload_id: str, context: Installation, who: WhoCalls) -> None:
    """Give an upload up. Its parts are removed."""
    direct_uploads.cancel(context, who.tenant, upload_id)
