"""`/v1/models`: the base models at hand, and what the jobs of the key's tenant have made."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.auth import AuthenticatedRoute, bearer
from api.deps import Installation, Reading, WhoCalls
from api.documentation import openai_answers
from api.openai.values import Deleted
from common import base_models, fine_tuned, removal
from common.context import Context
from common.db.rows import JobRow
from common.errors import Forbidden

router = APIRouter(
    prefix="/models", tags=["openai: models"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)]
)


class ModelObject(BaseModel):
    """A model: a base that a job can name, or what a job made. `created` is 0 where it is not known."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Base models, and then fine-tuned ones, newest first."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("")
def list_models(context: Installation, session: Reading, who: WhoCalls) -> ModelList:
    """List what a job can be trained on, and what the tenant's jobs have made."""
    bases = [_base(found.id) for found in base_models.at_hand(session, context.settings)]
    return ModelList(data=[*bases, *(_made(job) for job in fine_tuned.listed(session, who.tenant))])


@router.get("/{model:path}", responses=openai_answers(404))
def retrieve_model(model: str, context: Installation, session: Reading, who: WhoCalls) -> ModelObject:
    """Read a model."""
    if _is_base(model, context, session):
        return _base(model)
    return _made(fine_tuned.get(session, who.tenant, model))


@router.delete("/{model:path}", responses=openai_answers(403, 404))
def delete_model(model: str, context: Installation, who: WhoCalls) -> Deleted:
    """Delete a fine-tuned model, and with it its job, as `DELETE /jobs/{id}` does: history, checkpoints and files."""
    with context.read() as session:
        if _is_base(model, context, session):
            raise Forbidden(
                f"{model} is a base model, which belongs to the operator",
                param="model",
                hint="Only models that a job made can be deleted.",
            )
        job = fine_tuned.get(session, who.tenant, model)
    removal.remove(context, who.tenant, job.id)
    return Deleted(id=model, object="model")


def _is_base(model: str, context: Context, session: Session) -> bool:
    return any(model == found.id for found in base_models.at_hand(session, context.settings))


def _base(name: str) -> ModelObject:
    return ModelObject(id=name, created=0, owned_by="tunery")


def _made(job: JobRow) -> ModelObject:
    return ModelObject(id=fine_tuned.name(job), created=int(job.finished_at or job.created_at), owned_by=job.tenant)
