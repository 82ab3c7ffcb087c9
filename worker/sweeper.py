"""The sweeper: what nobody else does if nobody is there. Expires leases, rings again for work that waits, delivers
webhooks.

Any number may run; a lease in the database lets one of them lead. Neither Celery's beat nor its ETA: both would put
truth into the broker.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from common import previews, workers
from common.audit import collect
from common.context import Context
from common.db import refusals
from common.db.engine import db_now
from common.db.forgetting import removal
from common.db.rows import IdempotencyRow, JobRow, LeaderRow, UsageRow
from common.errors import InfraError
from common.expiry import remove_expired
from common.jobs import doorbell, lifecycle
from common.jobs.line import waits
from common.webhooks import outbox
from worker.deliverer import Deliverer

_NAME = "sweeper"
SWEEPS_PER_LEASE = 4
# A bell that was lost is repeated after so long.
RING_S = 5.0
IDEMPOTENCY_S = 86_400.0
# Quotas look back over a calendar month.
USAGE_S = 62 * 86_400.0
COLLECT_S = 3600.0
# So many leases are ended in one transaction: a worker that is late with its renewal waits no longer than for these.
EXPIRE_MOST = 100
_log = logging.getLogger(__name__)


class Sweeper:
    """One sweeping process."""

    def __init__(self, context: Context):
        self._context = context
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        self._period_s = min(context.settings.lease_s / SWEEPS_PER_LEASE, RING_S)
        self._collect_at = time.monotonic() + COLLECT_S
        self.stopped = threading.Event()

    def run(self) -> None:
        """Sweep until `stopped` is set, and deliver webhooks beside it, whoever leads."""
        deliverer = Deliverer(self._context, self.stopped)
        deliverer.start()
        self._sweep_until_stopped()
        deliverer.join()
        self.resign()

    def _sweep_until_stopped(self) -> None:
        while not self.stopped.is_set():
            try:
                if self.leads():
                    self.sweep()
            except (DBAPIError, PoolTimeout) as error:
                _log.warning("%s", refusals.logged(error))
            self.stopped.wait(self._period_s)

    def leads(self) -> bool:
        """Take or keep the lead; return whether this process has it. It lasts three sweeps."""
        until = db_now() + 3 * self._period_s
        mine_or_free = (LeaderRow.holder == self._holder) | (LeaderRow.expires_at < db_now())
        with self._context.write() as session:
            changed = session.execute(
                update(LeaderRow)
                .where(LeaderRow.name == _NAME, mine_or_free)
                .values(holder=self._holder, expires_at=until)
                .returning(LeaderRow.name)
            ).one_or_none()
            if changed is not None:
                return True
            if session.scalar(select(LeaderRow.name).where(LeaderRow.name == _NAME)) is not None:
                return False
        try:
            with self._context.write() as session:
                session.execute(insert(LeaderRow).values(name=_NAME, holder=self._holder, expires_at=until))
        except IntegrityError:
            return False
        return True

    def resign(self) -> None:
        """Give the lead up, so that another process need not wait for its end."""
        try:
            with self._context.write() as session:
                session.execute(delete(LeaderRow).where(LeaderRow.name == _NAME, LeaderRow.holder == self._holder))
        except (DBAPIError, PoolTimeout) as error:
            _log.warning("the lead could not be given up (%s)", type(error).__name__)

    def sweep(self) -> None:
        """Expire what is late, ring for what waits, forget what is old."""
        with self._context.read() as session:
            late = list(session.scalars(select(JobRow.id).where(JobRow.lease_expires_at < db_now())))
        for place in range(0, len(late), EXPIRE_MOST):
            self._expire(late[place : place + EXPIRE_MOST])
        with self._context.read() as session:
            rings = _waiting(session)
        for which, times in rings.items():
            self._context.doorbell.ring(which, times)
        self._remove_expired()
        self._collect()
        with self._context.write() as session:
            workers.forget_silent(session)
            previews.forget(session)
            outbox.forget(session)
            session.execute(removal(IdempotencyRow.created_at, IDEMPOTENCY_S))
            session.execute(removal(UsageRow.ended_at, USAGE_S))

    def _expire(self, job_ids: list[str]) -> None:
        """Expire in one transaction, for a site may lose all its workers at once; one bad row stops no other job."""
        try:
            with self._context.write() as session:
                settled = lifecycle.expire(session, job_ids)
        except (DataError, IntegrityError) as error:
            if len(job_ids) == 1:
                _log.error("%s: the lease ended, but its row cannot be changed (%s)", job_ids[0], error.orig)
                return
            middle = len(job_ids) // 2
            self._expire(job_ids[:middle])
            self._expire(job_ids[middle:])
            return
        for job_id, status in settled.items():
            _log.warning("%s: the lease ended; the job is %s", job_id, status)

    def _remove_expired(self) -> None:
        try:
            remove_expired(self._context)
        except InfraError as error:
            _log.warning("what has expired was not removed: %s", error.message)

    def _collect(self) -> None:
        """Now and then remove the objects that no row names."""
        older_than_s = self._context.settings.collect_after_s
        if not older_than_s or time.monotonic() < self._collect_at:
            return
        self._collect_at = time.monotonic() + COLLECT_S
        try:
            removed = collect(self._context, older_than_s).orphans
        except InfraError as error:
            _log.warning("nothing was collected: %s", error.message)
            return
        if removed:
            _log.info("removed %d objects that no row names", len(removed))


def _waiting(session: Session) -> dict[str, int]:
    """Return how often each bell is to be rung: once per idle worker, as far as there is work for them."""
    rings: dict[str, int] = {}
    for which, status in ((doorbell.PREFLIGHT, "validating"), (doorbell.TRAIN, "queued")):
        due = waits(status) & (JobRow.not_before <= db_now()) & JobRow.lease_expires_at.is_(None)
        if status == "queued":
            due &= JobRow.hold_until <= db_now()
        num_idle = max(1, workers.num_idle(session, which))
        waiting = len(list(session.scalars(select(JobRow.id).where(due).limit(num_idle))))
        if which == doorbell.PREFLIGHT and waiting < num_idle:
            waiting += previews.num_free(session, num_idle - waiting)
        if waiting:
            rings[which] = waiting
    return rings
