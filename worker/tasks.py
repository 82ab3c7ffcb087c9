"""What a bell does. The message says nothing; the database says everything."""

from __future__ import annotations

from celery import Celery

from worker.supervisor import Supervisor


def register(app: Celery, supervisor: Supervisor, which: str) -> None:
    """Give `app` the task that the bell for `which` starts."""

    @app.task(name=f"tunery.{which}")
    def ring() -> None:
        supervisor.work_off()
