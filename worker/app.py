"""The Celery app and how a worker process runs under it: one queue, one thread, one job at a time."""

from __future__ import annotations

import logging
from typing import Any

from celery.signals import worker_shutting_down

from common.jobs.doorbell import celery_app
from common.settings import Settings
from worker.lookout import Lookout
from worker.supervisor import Supervisor
from worker.tasks import register

_log = logging.getLogger(__name__)


def serve(settings: Settings, supervisor: Supervisor, which: str) -> int:
    """Listen for the bell on the queue `which` until the process is told to leave; a running job is drained.

    Returns:
        The exit code: 0 after a drain.
    """
    app = celery_app(settings)
    register(app, supervisor, which)

    def drain(**_: Any) -> None:
        _log.info("leaving: a job that runs is checkpointed and given back")
        supervisor.draining.set()

    worker_shutting_down.connect(drain)  # `drain` outlives the worker below: Celery holds receivers weakly
    worker = app.Worker(
        queues=[which],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel=settings.log_level,
        hostname=f"{supervisor.worker_id}@{which}",
    )
    lookout = Lookout(supervisor)
    lookout.start()
    if not supervisor.draining.is_set():
        worker.start()
    supervisor.draining.set()
    lookout.join()
    return int(worker.exitcode or 0)
