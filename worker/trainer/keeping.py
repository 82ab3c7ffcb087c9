"""Keeps what a run has reached: seals its checkpoints, remembers its best evaluation, stops where none better comes."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from worker.ml.best import store_weights
from worker.ml.checkpoint import BEST_WEIGHTS, BadCheckpoint, Manifest, all_finite, seal
from worker.trainer.faults import diverged
from worker.trainer.prepare import versions
from worker.trainer.protocol import Checkpoint, Note
from worker.trainer.run import Run


class Keeper(TrainerCallback):
    """One run's callback. The last to be called: what the others wrote down is sealed with the checkpoint."""

    def __init__(self, run: Run):
        self._run = run

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare an evaluation with those before, keep the weights of the best, stop when patience is at its end."""
        run, step, loss = self._run, state.global_step, kwargs["metrics"]["eval_loss"]
        if not math.isfinite(loss):
            raise diverged(f"the validation loss is {loss} at step {step}")
        if run.best.see(step, loss, run.options.threshold) and run.options.keep_best:
            store_weights(run.model, run.best_weights)
        if run.stopped_early() and step < state.max_steps:
            message = (
                f"stopping after step {step}: no validation loss in {run.best.waited} evaluations was "
                f"better than {run.best.loss:.4f} at step {run.best.step}"
            )
            run.send(Note("run.stopped_early", message, data={"step": step, "best_step": run.best.step}))
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal what the library has written, and tell the supervisor that it may be uploaded."""
        written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if not all_finite(written):
            raise diverged(f"the trained weights are not finite at step {state.global_step}")
        if self._out_of_bounds(state, control):
            # What an explosion has already spoilt must not take the place of the last good checkpoint.
            shutil.rmtree(written)
            loss = f"its loss is {self._run.trend.recent[-1]:.4g}"
            message = f"the checkpoint at step {state.global_step} is not kept: {loss}"
            self._run.send(Note("checkpoint.withheld", message, "warning", {"step": state.global_step}))
            return
        if self._run.best_weights.is_file():
            os.link(self._run.best_weights, written / BEST_WEIGHTS)
        name = f"step-{state.global_step:08d}"
        target = self._run.checkpoints / name
        target.parent.mkdir(exist_ok=True)
        seal(written, target, self._manifest(state))
        self._run.send(Checkpoint(state.global_step, f"checkpoints/{name}"))

    def _out_of_bounds(self, state: TrainerState, control: TrainerControl) -> bool:
        # Where the run leaves or ends here, going on needs this very step.
        leaves = control.should_training_stop or state.global_step >= state.max_steps
        return not leaves and self._run.trend.out_of_bounds(self._run.options.max_loss_ratio)

    def _manifest(self, state: TrainerState) -> Manifest:
        run = self._run
        return Manifest(
            step=state.global_step,
            max_steps=state.max_steps,
            epoch=float(state.epoch or 0.0),
            config_hash=run.spec.config_hash,
            versions=versions(),
            threads=run.threads,
            counters=run.counters.as_dict()
            | {"metrics": run.metrics, "best": asdict(run.best), "trend": asdict(run.trend), "samples": run.samples}
            | {"plan": asdict(run.plan) if run.plan else None},
        )


def take_up(run: Run, checkpoint: Path) -> None:
    """Take the weights of the best evaluation from the checkpoint that `run` goes on from.

    Raises:
        BadCheckpoint: there was such an evaluation, and its weights are not there.
    """
    if not run.options.keep_best or run.best.step is None:
        return
    if not (checkpoint / BEST_WEIGHTS).is_file():
        raise BadCheckpoint(f"the checkpoint {checkpoint.name} lacks the weights of its best evaluation")
    shutil.copyfile(checkpoint / BEST_WEIGHTS, run.best_weights)
