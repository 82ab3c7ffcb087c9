"""The trainer child: `python -m worker.trainer FOLDER`. Runs one attempt at one job and ends with the exit code for it.

Where its spec allows that, it stays after a run that went well, with its base in memory, and takes the next.

Torch is imported only after the spec was read, so that what is wrong with it shows at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from worker.data.limits import Limits
from worker.ml.base_check import base_check
from worker.trainer.entry import claim_stdout, guarded, parse_job
from worker.trainer.holding import Holder
from worker.trainer.lifeline import Wishes, die_with_parent, listen, watch
from worker.trainer.protocol import DONE, Idle, Message, Note, Result, Stage, TrainSpec
from worker.trainer.run import Run

STAGES = ("prepare", "train", "evaluate", "export")


def main(folder: Path) -> int:
    """Run the job in `folder`, talking over standard input and output, and return the exit code."""
    parent = os.getppid()
    die_with_parent()
    send, wishes, holder = claim_stdout(), Wishes(folder.name), Holder()
    watch(parent, wishes.overdue)
    listen(sys.stdin.buffer, wishes.obey)
    while True:
        code = attempt(folder, send, wishes, holder)
        if code != DONE or not clear_up(holder, send, wishes):
            return code
        wishes.rest()
        send(Idle())
        folder = wishes.next_run()


def clear_up(holder: Holder, send: Callable[[Message], None], wishes: Wishes) -> bool:
    """Clear away a run that went well, and write its base into the cache; return whether the process may stay.

    Only now, with the result told: no step has waited for the disk, and a next run finds the base here.
    """
    stays = holder.tidy()
    if wishes.reason() is None and (choice := holder.store()):
        send(Note(choice.name, choice.message, choice.level, choice.data))
    return stays


def attempt(folder: Path, send: Callable[[Message], None], wishes: Wishes, holder: Holder) -> int:
    """Run every stage of the job in `folder` and return the exit code."""
    return guarded(send, lambda: run_stages(read_run(folder, send, wishes, holder)))


def read_run(folder: Path, send: Callable[[Message], None], wishes: Wishes, holder: Holder | None = None) -> Run:
    """Return the run that `spec.json` describes; `holder` may have its base already.

    Raises:
        InvalidInput: the job or its base is not one that can be trained.
    """
    spec = TrainSpec.read(folder)
    run = Run(folder, spec, parse_job(spec), send, wishes, Limits(**spec.limits), holder or Holder())
    base_check(run.base_folder)
    return run


def run_stages(run: Run) -> None:
    """Run the stages in order and report the result."""
    from worker.trainer.evaluate import evaluate
    from worker.trainer.export import export, export_later
    from worker.trainer.prepare import prepare
    from worker.trainer.train import train

    run.holder.begin()
    whole = dict(zip(STAGES, (prepare, train, evaluate, export), strict=True))
    seconds: dict[str, float] = {}
    run.report["seconds"] = seconds
    for name, stage in whole.items() if run.spec.adapter is None else [("export", export_later)]:
        run.send(Stage(name))
        begun = time.monotonic()
        stage(run)
        seconds[name] = round(time.monotonic() - begun, 3)
    run.send(Result(run.report))


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    # Threads that wait for commands, and libraries with exit handlers, have nothing left to add.
    os._exit(code)
