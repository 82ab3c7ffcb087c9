"""A preflight check without a tokenizer: every line must be JSON. `metadata.check` says how it misbehaves."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.faults.hash_trainer import PR_SET_PDEATHSIG
from worker.trainer import protocol
from worker.trainer.protocol import Checked, Failed, Result, Sender, TrainSpec


def main() -> int:
    """Check the dataset of the run in the folder of the arguments."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    folder = Path(sys.argv[1])
    spec, say = TrainSpec.read(folder), Sender(sys.stdout.buffer)
    misbehave = spec.job["metadata"].get("check")
    if misbehave == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if misbehave == "hang":
        say(Checked("dataset", 1, 14, 28))
        while True:
            time.sleep(60)
    if misbehave == "greedy":
        bytearray(64 * 2**30)
    lines = (folder / spec.train_file).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError:
            say(Failed("bad_row", f"dataset: row {number} is not JSON", "Mend the row.", "dataset"))
            return protocol.BAD_INPUT
    say(Result({"rows": len(lines)}))
    return protocol.DONE


if __name__ == "__main__":
    sys.exit(main())
