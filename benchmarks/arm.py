"""`python -m benchmarks.arm FOLDER FIRST LAST OUT`: the run laid out in FOLDER by Tunery's own trainer, timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.stopwatch import Stopwatch
from worker.ml.sft import Trainer
from worker.trainer import protocol, train
from worker.trainer.__main__ import attempt
from worker.trainer.holding import Holder
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Failed, Message, Note, Result
from worker.trainer.run import Run


def run_with(folder: Path, hear: Callable[[Message], None], callback: Callable[[Run], TrainerCallback]) -> int:
    """Run every stage of the job in `folder`, in this process, and return the exit code.

    Args:
        callback: returns what is to be added to the callbacks of the run's trainer.
    """
    build = train.build_trainer

    def build_and_add(run: Run) -> Trainer:
        trainer = build(run)
        trainer.add_callback(callback(run))
        return trainer

    train.build_trainer = build_and_add
    return attempt(folder, hear, Wishes(), Holder())


def main(folder: Path, first: int, last: int, out: Path) -> int:
    """Run the job, time its steps, write the result, return the exit code."""
    watches: list[Stopwatch] = []
    said: list[Message] = []

    def watch(run: Run) -> Stopwatch:
        watches.append(Stopwatch(first, last, lambda: run.counters.tokens))
        return watches[-1]

    def hear(message: Message) -> None:
        said.append(message)
        if isinstance(message, Failed) or (isinstance(message, Note) and message.name.startswith(("kernels", "base"))):
            print(message, flush=True)

    code = run_with(folder, hear, watch)
    found: dict[str, Any] = {"exit_code": code}
    if code == protocol.DONE:
        report = next(message.report for message in said if isinstance(message, Result))
        found |= watches[0].result()
        found |= {name: report.get(name) for name in ("first_loss", "final_loss", "kernels", "optim", "versions")}
    else:
        found["error"] = next((message.message for message in said if isinstance(message, Failed)), None)
    out.write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
