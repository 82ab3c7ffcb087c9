"""The commands that run servers: `up`, `worker`, `sweeper`. Each becomes or supervises other processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.cli import state

_WORKER = (sys.executable, "-m", "worker")
# Above the time that a trainer gets for its checkpoint: what a worker needs to give its job back.
_LEAVE_S = 30.0


def up(
    ctx: typer.Context,
    port: Annotated[int | None, typer.Option(help="Port of the API; 0 takes a free one.", min=0, max=65535)] = None,
    workers: Annotated[
        int | None, typer.Option(help="Workers to start; otherwise one per GPU, at least one.", min=0)
    ] = None,
    data_dir: state.DataDir = None,
) -> None:
    """Start a whole Tunery on this machine. Ctrl-C stops all of it.

    Parts whose address is not set (TUNERY_DATABASE_URL, TUNERY_BROKER_URL, TUNERY_S3_ENDPOINT_URL) are started too,
    with their data under the data directory.
    """
    from common.embedded.up import run_up

    raise typer.Exit(run_up(port=port, workers=workers, data_dir=data_dir or state.of(ctx).data_dir))


def worker(
    preflight: Annotated[bool, typer.Option("--preflight", help="Check jobs on the CPU instead of training.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Work off one job, if one waits, and leave.")] = False,
    idle_timeout: Annotated[
        float | None, typer.Option(help="Leave after so many seconds without a job.", min=0)
    ] = None,
) -> None:
    """Start a worker for each visible GPU.

    Each is pinned to its card; without a GPU, one works on the CPU.
    """
    from common import settings
    from common.cards import cards

    kind = "preflight" if preflight else "train"
    arguments = [kind, *(["--once"] if once else [])]
    if idle_timeout is not None:
        arguments += ["--idle-timeout", str(idle_timeout)]
    # A worker that TUNERY_DEVICE places is not placed again.
    pinned = cards() if kind == "train" and settings.load().device == "auto" else []
    if len(pinned) > 1:
        raise typer.Exit(_supervise(pinned, arguments, revive=not once and idle_timeout is None))
    _become(arguments, {"CUDA_VISIBLE_DEVICES": pinned[0]} if pinned else {})


def sweeper() -> None:
    """Start the sweeper.

    It takes jobs from lost workers and rings again for those that wait: run at least one.
    """
    _become(["sweeper"], {})


def _become(arguments: list[str], environment: dict[str, str]) -> None:
    from common.settings import child_environment

    sys.stdout.flush()
    os.execve(sys.executable, [*_WORKER, *arguments], child_environment(environment))


def _supervise(cards: list[str], arguments: list[str], *, revive: bool) -> int:
    """Run a worker per card until a signal, or until all have left by themselves; return an exit code."""
    import signal
    import threading

    from common import settings
    from common.embedded.children import Child, Children

    loaded = settings.load()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    children = Children(lambda line: typer.echo(line, err=True))
    try:
        for card in cards:
            values = {"CUDA_VISIBLE_DEVICES": card}
            log = _log_of(loaded.work_dir, card)
            environment = settings.child_environment(values)
            argv = (*_WORKER, *arguments)
            children.start(Child(f"worker {card}", argv, environment, log, grace_s=loaded.stop_grace_s + _LEAVE_S))
            typer.echo(f"worker on card {card}: {log}", err=True)
        while not stopped.wait(0.2) and (revive or children.pids()):
            if revive:
                children.revive()
    finally:
        children.stop()
    return 0


def _log_of(work_dir: Path, card: str) -> Path:
    # A card may be named by its UUID; a path separator is never part of it.
    return work_dir.absolute() / "logs" / f"worker-{card.replace('/', '-')}.log"
