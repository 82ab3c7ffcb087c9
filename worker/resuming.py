"""Which checkpoint an attempt goes on from: the highest that is whole and fits the run, or none.

One that cannot be used is passed over, with an event: it costs work, and never the job.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from common.context import Context
from common.db.rows import CheckpointRow
from common.jobs import queries
from common.jobs.lifecycle import Claim
from worker import publish
from worker.recorder import Recorder


class Checkpoints:
    """The checkpoints of a job, from the highest down, each fetched into `folder` once it is asked for."""

    def __init__(self, context: Context, claim: Claim, folder: Path, recorder: Recorder):
        self._store = context.store
        self._folder = folder
        self._recorder = recorder
        with context.read() as session:
            self._left = queries.checkpoints(session, claim.job_id)
        self._passed = 0
        self._chosen: CheckpointRow | None = None

    def next(self, config_hash: str, alive: Callable[[], None]) -> str | None:
        """Return the folder of the next one that is whole and of a run with `config_hash`, relative to the run's."""
        while self._left:
            alive()
            found = self._left.pop(0)
            target = self._folder / "resume" / f"step-{found.step:08d}-a{found.epoch}"
            self._chosen = found
            refusal = publish.restore(self._store, found.prefix, found.manifest_sha256, target, config_hash)
            if refusal is None:
                self._recorder.event("job.restored", f"Going on from step {found.step}.", step=found.step)
                return str(target.relative_to(self._folder))
            shutil.rmtree(target, ignore_errors=True)
            self.refuse(refusal)
        if self._passed:
            message = f"None of {self._passed} checkpoints can be gone on from; starting at the first step."
            self._recorder.event("job.started_over", message, "warning", checkpoints=self._passed)
        return None

    def refuse(self, why: str) -> None:
        """Note that the one that was returned last cannot be gone on from."""
        assert self._chosen is not None
        self._passed += 1
        message = f"The checkpoint at step {self._chosen.step} is passed over: {why}."
        self._recorder.event("checkpoint.refused", message, "warning", step=self._chosen.step)
