"""Base models that need no hub: folders of the operator's, and what workers hold."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading
from common import base_models
from common.schemas.workers import BaseModelList

router = APIRouter(
    prefix="/base-models", tags=["base models"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)


@router.get("")
def list_base_models(context: Installation, session: Reading) -> BaseModelList:
    """List the base models that a job can name and that are here already."""
    return BaseModelList(data=base_models.at_hand(session, context.settings))
