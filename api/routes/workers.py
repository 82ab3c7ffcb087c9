"""Workers: who is there, and who shall go."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from api.auth import AuthenticatedRoute, bearer
from api.deps import Administrator, Reading, WhoCalls, Writing
from api.documentation import problem_answers
from common import workers
from common.jobs import queries
from common.schemas.workers import Worker, WorkerList

router = APIRouter(prefix="/workers", tags=["workers"], route_class=AuthenticatedRoute, dependencies=[Depends(bearer)])


@router.get("")
def list_workers(session: Reading, who: WhoCalls) -> WorkerList:
    """List workers with heartbeat, device, state and the base that they hold. Of jobs, only your own are named."""
    found = workers.listed(session)
    if who.admin:
        return WorkerList(data=found)
    own = queries.owned(session, who.tenant, [worker.job for worker in found if worker.job])
    return WorkerList(
        data=[worker if worker.job in own else worker.model_copy(update={"job": None}) for worker in found]
    )


@router.post("/{worker_id}/drain", responses=problem_answers(403, 404))
def drain_worker(worker_id: str, session: Writing, _: Administrator) -> Worker:
    """Let a worker hand back or finish its job and take no other."""
    return workers.drain(session, worker_id)
