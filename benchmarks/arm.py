"""`python -m benchmarks.arm FOLDER FIRST LAST OUT`: the run laid out in FOLDER by Tunery's own trainer, timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.stopwatch import Stopwatch
from worker.trainer import protocol, train
from worker.trainer.__main__ import attempt
from worker.trainer.holding import Holder
from worker.trainer.lifeline import Wishes
from worker.trainer.protocol import Failed, Message, Note, Result
from worker.trainer.run import Run


def main(folder: Path, first: int, last: int, out: Path) -> int:
    """Run every stage of the job, time its steps, write the result, return the exit code."""
    watches: list[Stopwatch] = []
    said: list[Message] = []
    build = train.build_trainer

    def build_and_time(run: Run) -> Any:
        trainer = build(run)
        watches.append(Stopwatch(first, last, lambda: run.counters.tokens))
        trainer.add_callback(watches[-1])
        return trainer

    def hear(message: Message) -> None:
        said.append(message)
        if isinstance(message, Failed) or (isinstance(message, Note) and message.name.startswith(("kernels", "base"))):
            print(message, flush=True)

    train.build_trainer = build_and_time
    code = attempt(folder, hear, Wishes(), Holder())
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
