"""Looks at the database now and then, without having been rung.

The bell is the fast way to a job, and not the only one: a consumer can fall deaf and never say so. In a fault run the
connection of a worker was reset while it acknowledged a bell; Celery 5.7 waited on for a message that could not come
any more, the process looked healthy, and five jobs waited for a check that nobody made.
"""

from __future__ import annotations

import logging
import threading

from worker.supervisor import Supervisor

# Half of what a wait for a broker's return may cost.
LOOK_S = 15.0
_log = logging.getLogger(__name__)


class Lookout:
    """A thread that works off what waits, every `look_s`, until the supervisor drains."""

    def __init__(self, supervisor: Supervisor, look_s: float = LOOK_S):
        self._supervisor = supervisor
        self._look_s = look_s
        # Trainers end with the thread that started them: this one lives until its last job is settled.
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def join(self) -> None:
        """Wait until a job that this thread works on is settled; call it once the supervisor drains."""
        self._thread.join()

    def _run(self) -> None:
        while not self._supervisor.draining.wait(self._look_s):
            if done := self._supervisor.work_off():
                _log.warning("%d jobs waited and no bell rang; if this repeats, the broker does not reach here", done)
