"""Base models that need no hub: folders of the operator's, and what workers hold."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading
from common import base_models, workers
from common.schemas.workers import BaseModelInfo, BaseModelList

router = APIRouter(
    prefix="/base-models", tags=["base models"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)


@router.get("")
def list_base_models(context: Installation, session: Reading) -> BaseModelList:
    """List the base models that a job can name and that are here already."""
    folders = base_models.listed(context.settings)
    known = {name for folder in folders for name in (folder.id, folder.name)}
    held = sorted({worker.base_model for worker in workers.listed(session) if worker.base_model} - known)
    return BaseModelList(data=[*folders, *(BaseModelInfo(id=name, name=name, source="worker") for name in held)])
