"""`python -m worker train|preflight|sweeper`: one worker process, or the sweeper."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time

from common import context as contexts
from common import settings as settings_of
from common.context import Context
from common.errors import TuneryError
from common.log import configure
from worker.app import serve
from worker.preflight import Preflight
from worker.supervisor import Supervisor
from worker.sweeper import Sweeper
from worker.training import Training
from worker.workplace import Device, Workplace, find_device

_IDLE_POLL_S = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Run the process that the arguments name and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    parser.add_argument("kind", choices=("train", "preflight", "sweeper"))
    parser.add_argument("--once", action="store_true", help="work off one job, if one waits, and leave")
    parser.add_argument("--idle-timeout", type=float, metavar="SECONDS", help="leave after so long without a job")
    chosen = parser.parse_args(arguments)
    try:
        settings = settings_of.load()
        configure(settings)
        context = contexts.build(settings)
        if chosen.kind == "sweeper":
            return sweep(context)
        return work(context, chosen.kind, once=chosen.once, idle_timeout_s=chosen.idle_timeout)
    except TuneryError as error:
        print(f"{error.message}{f' {error.hint}' if error.hint else ''}", file=sys.stderr)
        return 1


def work(context: Context, kind: str, *, once: bool = False, idle_timeout_s: float | None = None) -> int:
    """Run a worker of `kind` until it is told to leave, or, by `once` or `idle_timeout_s`, has nothing to do."""
    device = find_device(context.settings.device) if kind == "train" else Device("cpu")
    workplace = Workplace(context.settings)
    supervisor = Supervisor(context, Training() if kind == "train" else Preflight(), workplace, device)
    # From the first report on a signal means drain; Celery puts its own handlers in place of these later.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.draining.set())
    supervisor.start()
    try:
        if once or idle_timeout_s is not None:
            return work_without_bell(supervisor, once, idle_timeout_s or 0.0)
        return serve(context.settings, supervisor, kind)
    finally:
        supervisor.close()
        context.close()


def work_without_bell(supervisor: Supervisor, once: bool, idle_timeout_s: float) -> int:
    """Work without a broker: look at the database every second, as a pod that was started for one job does."""
    idle_since = time.monotonic()
    while not supervisor.draining.is_set():
        if supervisor.work_off(most=1 if once else None):
            idle_since = time.monotonic()
            if once:
                break
        elif time.monotonic() - idle_since >= idle_timeout_s:
            break
        supervisor.draining.wait(_IDLE_POLL_S)
    return 0


def sweep(context: Context) -> int:
    """Run the sweeper until SIGTERM or SIGINT."""
    sweeper = Sweeper(context)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sweeper.stopped.set())
    logging.getLogger(__name__).info("sweeping")
    sweeper.run()
    context.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
