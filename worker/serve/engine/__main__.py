"""The model behind chat completions: `python -m worker.serve.engine FOLDER`. Lives until its server ends or an error.

Any error but a refusal ends it: what a batch that broke may have left on the model is never used again. Torch is
imported only after the base was looked at, so that what is wrong with it shows at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from worker.ml.base_check import base_check
from worker.serve.engine.inbox import Inbox
from worker.serve.protocol import ServeSpec
from worker.trainer.entry import claim_stdout
from worker.trainer.faults import classify
from worker.trainer.lifeline import die_with_parent, listen, watch


def main(folder: Path) -> int:
    """Serve the base that `spec.json` in `folder` names, and return the exit code."""
    parent = os.getppid()
    die_with_parent()
    say, inbox = claim_stdout(), Inbox()
    watch(parent, lambda: False)
    listen(sys.stdin.buffer, inbox.obey)
    try:
        spec = ServeSpec.read(folder)
        facts = base_check(Path(spec.base.path))
        from worker.serve.engine.engine import Engine

        Engine(spec, facts, inbox, say).run()
    except BaseException as error:
        code, failure = classify(error)
        traceback.print_exc()
        if failure is not None:
            say(failure)
        return code
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)
