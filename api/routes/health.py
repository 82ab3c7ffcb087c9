"""Is the process alive, and can a job be taken? Neither needs a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers."""

    status: str


class Check(BaseModel):
    """Whether a part is well, and if not, why."""

    ok: bool
    detail: str | None


class Ready(BaseModel):
    """Whether a job can be taken, what each part says, and what would delay a job."""

    ready: bool
    checks: dict[str, Check]
    warnings: list[str]


_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "A job cannot be taken."}}


@router.get("/livez")
async def livez() -> Alive:
    """Say that the process answers."""
    return Alive(status="ok")


@router.get("/readyz", response_model=Ready, responses=_NOT_READY)
def readyz(request: Request) -> JSONResponse:
    """Say whether a job can be taken: 200 if the database, its schema and the bucket answer, otherwise 503."""
    ready, report = request.app.state.readiness.report()
    return JSONResponse(report, 200 if ready else 503, {"Cache-Control": "no-store"})
