"""Carries a schedule out: finds the moment, does the harm, notes whom it met, and ends what lasts."""

from __future__ import annotations

import heapq
import itertools
import random
import re
import signal
import time
from collections.abc import Callable

import psutil

from tests.faults.journal import Journal
from tests.faults.schedule import WAYS_TO_BREAK, Fault
from tests.faults.service import Service
from tests.faults.stack import WORKERS, Stack, waited_for

_FOLDER = re.compile(r"(job_\w+)-a(\d+)$")
_MOMENT_S = 8.0
_DELAY_S = 0.3
_LOOK_S = 0.05


class Injector:
    """Does to `stack` what a schedule says, and writes each fault into the journal with the jobs that it met."""

    def __init__(self, stack: Stack, journal: Journal, randomness: random.Random):
        self._stack = stack
        self._journal = journal
        self._random = randomness
        self._ends: list[tuple[float, int, str, Callable[[], None]]] = []
        self._count = itertools.count()

    def run(self, faults: list[Fault]) -> None:
        """Inject all of `faults` and wait until the last one has ended."""
        for fault in faults:
            self._pass(fault.after_s)
            self._free(fault.whom)
            self._inject(fault)
        while self._ends:
            self._pass(0.1)

    def _pass(self, seconds: float) -> None:
        """Let time pass; what has lasted long enough ends meanwhile."""
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            while self._ends and self._ends[0][0] <= now:
                heapq.heappop(self._ends)[3]()
            time.sleep(_LOOK_S)

    def _free(self, whom: str) -> None:
        """Wait until nothing that lasts is being done to `whom`."""
        while any(each[2] == whom for each in self._ends):
            self._pass(_LOOK_S)

    def _lasting(self, fault: Fault, end: Callable[[], None]) -> None:
        heapq.heappush(self._ends, (time.monotonic() + fault.lasts_s, next(self._count), fault.whom, end))

    def _inject(self, fault: Fault) -> None:
        if fault.whom in ("trainer", "worker", "host"):
            self._harm_training(fault)
        elif fault.what in WAYS_TO_BREAK:
            self._break(fault)
        elif fault.what == "fill":
            self._note(fault)
            self._stack.fill_disk()
            self._lasting(fault, self._stack.free_disk)
        else:
            self._harm(fault, self._stack.services[fault.whom])

    def _harm(self, fault: Fault, service: Service) -> None:
        waited_for(lambda: service.running, _MOMENT_S)
        self._note(fault)
        if fault.what == "freeze":
            service.signal(signal.SIGSTOP)
            self._lasting(fault, lambda: service.signal(signal.SIGCONT))
            return
        if fault.what == "wipe":
            service.before_start = self._stack.wipe_broker
        service.kill()

    def _break(self, fault: Fault) -> None:
        proxy = self._stack.proxies[fault.whom]
        self._note(fault)
        if fault.what == "delay":
            proxy.delay(_DELAY_S)
        else:
            getattr(proxy, fault.what)()
        if fault.lasts_s:
            self._lasting(fault, proxy.heal)

    def _harm_training(self, fault: Fault) -> None:
        """Wait for a trainer, and harm it, its worker, or both, at any moment of the job's life."""
        worker, trainer, met = self._moment()
        self._note(fault, worker.name, *met)
        victims = [trainer] if trainer and fault.whom in ("trainer", "host") else []
        if fault.what == "freeze":
            self._freeze(fault, worker if fault.whom != "trainer" else None, victims)
        elif fault.whom == "trainer":
            for victim in victims:
                _send(victim, signal.SIGKILL)
        elif fault.what == "drain":
            worker.signal(signal.SIGTERM)
        else:
            worker.kill()

    def _moment(self) -> tuple[Service, psutil.Process | None, tuple[str, int] | tuple[()]]:
        """Return a worker at some moment of a job's life, its trainer, and the job's id and attempt."""
        deadline = time.monotonic() + _MOMENT_S
        while time.monotonic() < deadline:
            if found := self._training():
                worker, trainer = self._random.choice(found)
                self._pass(self._random.uniform(0, 0.4))
                if met := _job_of(trainer):
                    return worker, trainer, met
            self._pass(_LOOK_S)
        # Nobody trains for so long: then a worker that waits is harmed.
        return self._stack.services[self._random.choice(WORKERS)], None, ()

    def _freeze(self, fault: Fault, worker: Service | None, trainers: list[psutil.Process]) -> None:
        frozen = [*([psutil.Process(worker.pid)] if worker and worker.running else []), *trainers]
        for process in frozen:
            _send(process, signal.SIGSTOP)
        self._lasting(fault, lambda: [_send(process, signal.SIGCONT) for process in frozen] and None)

    def _training(self) -> list[tuple[Service, psutil.Process]]:
        """Return the workers that have a trainer now and are not frozen."""
        workers = [self._stack.services[name] for name in WORKERS]
        found = [(worker, worker.trainer) for worker in workers if worker.running and not _stopped(worker.pid)]
        return [(worker, trainer) for worker, trainer in found if trainer is not None]

    def _note(self, fault: Fault, target: str = "", job: str | None = None, epoch: int | None = None) -> None:
        self._journal.write(
            "fault", number=fault.number, what=fault.what, whom=fault.whom, target=target or fault.whom,
            lasts_s=round(fault.lasts_s, 2), job=job, epoch=epoch,
        )  # fmt: skip


def _job_of(trainer: psutil.Process) -> tuple[str, int] | tuple[()]:
    """Return job and attempt of a trainer, which are in the name of its folder."""
    try:
        match = _FOLDER.search(trainer.cmdline()[-1])
    except (psutil.NoSuchProcess, IndexError):
        return ()
    return (match[1], int(match[2])) if match else ()


def _stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
