"""What a worker process does when the bell rings: claim, run one attempt, and claim again until nothing waits.

Never imports torch: it holds the credentials, and the child that runs model code holds none.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from common import workers
from common.context import Context
from common.db import refusals
from common.jobs.lifecycle import Claim
from common.workers import BEAT_S, Beat
from worker.free_memory import FreeMemory
from worker.heart import Heart
from worker.workplace import Device, Workplace

_log = logging.getLogger(__name__)


class Work(Protocol):
    """One kind of work: how it is claimed and how a claim is worked off."""

    kind: str

    def prepare(self, context: Context, workplace: Workplace, draining: threading.Event) -> bool:
        """Do some of the short work that comes before a claim; return whether there is more of it."""

    def claim(self, context: Context, worker_id: str) -> Claim | None:
        """Claim a job, or return None."""

    def run(self, context: Context, claim: Claim, heart: Heart, workplace: Workplace, device: Device) -> str | None:
        """Work off `claim`; return the base model that is now at hand, if any. Never raises."""

    def mark(self) -> int | None:
        """Return another number after each process that was given the card, and None while one has it."""

    def close(self) -> None:
        """End what is kept for the next job."""


class Supervisor:
    """One worker process: it works on one job at a time and reports itself every few seconds."""

    def __init__(self, context: Context, work: Work, workplace: Workplace, device: Device):
        self._context = context
        self._work = work
        self._workplace = workplace
        self._device = device
        self._busy = threading.Lock()
        self._job: str | None = None
        self._base: str | None = None
        self._closed = threading.Event()
        self.draining = threading.Event()
        self.on_drain: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        self._free = FreeMemory(device, work.mark)
        self._beats = threading.Thread(target=self._beat, name="beats", daemon=True)

    def start(self) -> None:
        """Begin to report this worker."""
        self._free.start()
        self._beats.start()

    def close(self) -> None:
        """Say good-bye and clear the working folder."""
        self._work.close()
        self._closed.set()
        self._free.close()
        if self._beats.ident is not None:
            self._beats.join(timeout=10)
        try:
            with self._context.write() as session:
                workers.leave(session, self._workplace.id)
        except (DBAPIError, PoolTimeout) as error:
            _log.warning("the database did not hear that this worker leaves (%s)", type(error).__name__)
        self._workplace.close()

    @property
    def worker_id(self) -> str:
        """The id of this worker in rows and logs."""
        return self._workplace.id

    def work_off(self, most: int | None = None) -> int:
        """Work until nothing waits, `most` jobs are done or this worker drains; return the number of jobs.

        A second caller returns at once.
        """
        if not self._busy.acquire(blocking=False):
            return 0
        try:
            done = 0
            while done != most and not self.draining.is_set() and self._one():
                done += 1
            return done
        finally:
            self._busy.release()

    def _one(self) -> bool:
        if not self._workplace.has_room():
            _log.error("the disk has less than TUNERY_DISK_RESERVE_BYTES free: this worker takes no job")
            return False
        try:
            claim, more = None, True
            while claim is None and more:
                more = self._work.prepare(self._context, self._workplace, self.draining)
                before = time.monotonic()
                claim = self._work.claim(self._context, self._workplace.id)
        except (DBAPIError, PoolTimeout) as error:
            _log.warning("%s; the bell will ring again", refusals.logged(error))
            return False
        if claim is None:
            return False
        _log.info("%s: claimed, attempt %d", claim.job_id, claim.epoch)
        self._job = claim.job_id
        heart = Heart(self._context, claim, before, self.draining)
        try:
            self._base = self._work.run(self._context, claim, heart, self._workplace, self._device)
        except Exception:
            # No further claim until the next bell: what is wrong here (a full disk?) would meet every job.
            _log.exception("%s: the work could not be begun; the job waits for the end of its lease", claim.job_id)
            return False
        finally:
            heart.close()
            self._job = None
        return True

    def _beat(self) -> None:
        while True:
            try:
                with self._context.write() as session:
                    wish = workers.beat(session, self._report())
                if wish == "drain" and not self.draining.is_set():
                    _log.info("the operator asked this worker to drain")
                    self.draining.set()
                    self.on_drain()
            except (DBAPIError, PoolTimeout) as error:
                _log.warning("the database did not take this worker's report (%s)", type(error).__name__)
            if self._closed.wait(BEAT_S):
                return

    def _report(self) -> Beat:
        state = "draining" if self.draining.is_set() else "busy" if self._job else "idle"
        name = self._context.settings.worker_name or self._workplace.id
        return Beat(
            self._workplace.id,
            name,
            self._work.kind,
            self._device.device,
            self._device.name,
            self._device.vram_bytes,
            state,
            self._job,
            self._base,
            self._free.bytes,
        )
