"""One sweeper beside 200 simulated workers and a long queue: how long its rounds take, and how late it is.

A worker is a row and a lease; it claims, renews, reports and publishes by the verbs that real ones use, from processes
of their own. Some die in the middle of a job: their leases must end in time. The broker is a real Valkey; nothing is
collected from the store, and no webhook is registered.
"""

from __future__ import annotations

import heapq
import logging
import multiprocessing
import random
import statistics
import threading
import time
from typing import Any

from sqlalchemy import func, select

from common import context as contexts
from common import workers
from common.context import Context
from common.db.engine import db_now
from common.db.rows import EventRow, JobRow
from common.errors import LeaseLost
from common.jobs import lifecycle
from common.settings import Settings
from worker.heart import RENEWALS_PER_LEASE
from worker.sweeper import SWEEPS_PER_LEASE, Sweeper

LEASE_S = 20.0
WORKERS = 200
_PROCESSES = 2
_THREADS = 8
_REPORT_S = 5.0
_JOB_S = (20.0, 40.0)
_DEATH = 0.1


class _Worker:
    """One simulated worker; `step` does what is due and returns the moment of the next."""

    def __init__(self, parts: Context, name: str):
        self._parts = parts
        self._name = name
        self._claim: lifecycle.Claim | None = None
        self._step = 0
        self._renew_at = self._report_at = self._end_at = self._beat_at = 0.0
        self.counts = {"claims": 0, "published": 0, "deaths": 0, "lost": 0, "late_ms": 0}

    def step(self) -> float:
        """Do what is due and return the moment of the next step, in monotonic time."""
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat()
            self._beat_at = now + workers.BEAT_S
        if self._claim is None:
            self._take()
        else:
            try:
                self._work(now, self._claim)
            except LeaseLost:
                self.counts["lost"] += 1
                self._claim = None
        if self._claim is None:
            return time.monotonic() + 1.0
        return min(self._renew_at, self._report_at, self._end_at, self._beat_at)

    def _beat(self) -> None:
        state = "idle" if self._claim is None else "busy"
        job_id = None if self._claim is None else self._claim.job_id
        report = workers.Beat(self._name, self._name, "train", "cpu", None, None, state, job_id)
        with self._parts.sessions.write() as session:
            workers.beat(session, report)

    def _take(self) -> None:
        with self._parts.sessions.write() as session:
            self._claim = lifecycle.claim(session, self._name, LEASE_S)
        if self._claim is not None:
            self.counts["claims"] += 1
            now, self._step = time.monotonic(), 0
            self._renew_at, self._report_at = now + LEASE_S / RENEWALS_PER_LEASE, now + _REPORT_S
            self._end_at = now + random.uniform(*_JOB_S)

    def _work(self, now: float, claim: lifecycle.Claim) -> None:
        if now >= self._end_at:
            self._claim = None
            if random.random() < _DEATH:
                # As a machine that loses its power: no word to anybody.
                self.counts["deaths"] += 1
                return
            artifact = {"name": "manifest.json", "key": claim.job_id, "bytes": 2, "sha256": "0" * 64}
            with self._parts.sessions.write() as session:
                lifecycle.publish(session, claim, lifecycle.Published(claim.job_id, "0" * 64, [artifact]), {})
            self.counts["published"] += 1
            return
        if now >= self._renew_at:
            self.counts["late_ms"] = max(self.counts["late_ms"], round(1000 * (now - self._renew_at)))
            with self._parts.sessions.write() as session:
                lifecycle.renew(session, claim)
            self._renew_at = time.monotonic() + LEASE_S / RENEWALS_PER_LEASE
        if now >= self._report_at:
            self._step += 1
            point = lifecycle.MetricPoint(self._step, {"loss": 1.0})
            with self._parts.sessions.write() as session:
                lifecycle.advance(session, claim, progress={"step": self._step, "loss": 1.0}, metrics=[point])
            self._report_at = time.monotonic() + _REPORT_S


def _crew(settings: Settings, names: list[str], seconds: float, told: Any) -> None:
    """Let the workers `names` work for so long, from a process with `_THREADS` threads; tell what they did."""
    parts = contexts.build(settings)
    crew = [_Worker(parts, name) for name in names]
    # Not all at once: they came over some seconds.
    due = [(time.monotonic() + random.uniform(0, 5), place) for place in range(len(crew))]
    heapq.heapify(due)
    until, changed = time.monotonic() + seconds, threading.Lock()

    def work() -> None:
        while (now := time.monotonic()) < until:
            with changed:
                at, place = heapq.heappop(due) if due and due[0][0] <= now else (0.0, -1)
            if place < 0:
                time.sleep(0.01)
                continue
            at = crew[place].step()
            with changed:
                heapq.heappush(due, (at, place))

    threads = [threading.Thread(target=work) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.put({name: [worker.counts[name] for worker in crew] for name in crew[0].counts})
    parts.close()


class _Timed(Sweeper):
    """The sweeper, which notes how long each round took."""

    def __init__(self, context: Context):
        super().__init__(context)
        self.rounds: list[float] = []
        self.late: list[float] = []

    def sweep(self) -> None:
        """Sweep, timed; note first how long ago the leases ended that this round takes away."""
        with self._context.read() as session:
            over = db_now() - JobRow.lease_expires_at
            self.late += session.scalars(select(over).where(JobRow.lease_expires_at < db_now()))
        begun = time.perf_counter()
        super().sweep()
        self.rounds.append(time.perf_counter() - begun)


def sweep(parts: Context, seconds: float) -> dict[str, Any]:
    """Run the crew and one sweeper over a table in which jobs wait, and return what was measured."""
    # It names each job whose worker died.
    logging.getLogger(Sweeper.__module__).setLevel(logging.ERROR)
    settings = parts.settings.model_copy(update={"lease_s": LEASE_S})
    with parts.read() as session:
        begun, waiting = session.execute(select(db_now(), _num(JobRow.status == "queued"))).one()
    spawned = multiprocessing.get_context("spawn")
    told = spawned.Queue()
    share = [[f"sim-{number}" for number in range(first, WORKERS, _PROCESSES)] for first in range(_PROCESSES)]
    crews = [spawned.Process(target=_crew, args=(settings, names, seconds, told)) for names in share]
    own = contexts.build(settings)
    sweeper = _Timed(own)
    thread = threading.Thread(target=sweeper.run)
    thread.start()
    for crew in crews:
        crew.start()
    found: dict[str, list[int]] = {}
    for counts in (told.get(timeout=seconds + 120) for _ in crews):
        found = {name: found.get(name, []) + counts[name] for name in counts}
    for crew in crews:
        crew.join()
    # Those that died at last, and all that were at work when the crew ended.
    time.sleep(LEASE_S + 2 * LEASE_S / SWEEPS_PER_LEASE)
    sweeper.stopped.set()
    thread.join()
    own.close()
    return {"waiting": int(waiting)} | _told(parts, begun, found, sweeper)


def _num(condition: Any) -> Any:
    return select(func.count()).where(condition).scalar_subquery()


def _told(parts: Context, begun: float, found: dict[str, list[int]], sweeper: _Timed) -> dict[str, Any]:
    with parts.read() as session:
        expired = _num((EventRow.name == "job.lease_expired") & (EventRow.at > begun))
        taken, left = session.execute(select(expired, _num(JobRow.lease_expires_at < db_now()))).one()
    times = [1000 * each for each in sweeper.rounds]
    return {
        "workers": WORKERS, "lease_s": LEASE_S, "interval_s": LEASE_S / SWEEPS_PER_LEASE,
        "rounds": len(times), "round_p50_ms": round(statistics.median(times), 1), "round_p99_ms": _p99(times),
        "claims": sum(found["claims"]), "published": sum(found["published"]), "deaths": sum(found["deaths"]),
        "workers_without_a_job": found["claims"].count(0), "leases_lost_alive": sum(found["lost"]),
        "latest_renewal_ms": max(found["late_ms"]), "expired": taken, "expired_left": left,
        "expired_late_p50_s": round(statistics.median(sweeper.late), 2),
        "expired_late_most_s": round(max(sweeper.late), 2),
    }  # fmt: skip


def _p99(times: list[float]) -> float:
    return round(statistics.quantiles(times, n=100, method="inclusive")[98], 1)
