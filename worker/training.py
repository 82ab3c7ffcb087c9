"""The work of a GPU worker: claim a queued job, run an attempt at it."""

from __future__ import annotations

import threading

from common.context import Context
from common.jobs import doorbell, lifecycle
from common.jobs.lifecycle import Claim
from worker.attempt import Attempt
from worker.heart import Heart
from worker.trainers import Trainers
from worker.workplace import Device, Workplace


class Training:
    """Trains."""

    kind = doorbell.TRAIN

    def __init__(self) -> None:
        self._held_base: str | None = None
        self._trainers: Trainers | None = None

    def prepare(self, context: Context, workplace: Workplace, draining: threading.Event) -> bool:
        """Nothing: a GPU is for jobs."""
        return False

    def claim(self, context: Context, worker_id: str) -> Claim | None:
        """Claim the best queued job; one whose base lies here already comes first among the fresh ones."""
        with context.write() as session:
            return lifecycle.claim(session, worker_id, context.settings.lease_s, self._held_base)

    def run(self, context: Context, claim: Claim, heart: Heart, workplace: Workplace, device: Device) -> str | None:
        """Run one attempt and return the base that it used."""
        self._trainers = self._trainers or Trainers(context.settings, workplace.folder / "trainer")
        with workplace.job(claim) as folder:
            attempt = Attempt(context, claim, heart, folder, device.device, self._trainers)
            attempt.run()
        self._held_base = attempt.base_id or self._held_base
        return self._held_base

    def mark(self) -> int | None:
        """Return how many trainers were started, or None while one may have the card."""
        return self._trainers.mark() if self._trainers is not None else 0

    def close(self) -> None:
        """End the process that still holds a base."""
        if self._trainers is not None:
            self._trainers.close()
