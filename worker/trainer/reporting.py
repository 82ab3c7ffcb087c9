"""Tells the supervisor how a run goes, and stops it when that is wished."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from worker.ml.sft import Trainer
from worker.trainer.faults import diverged
from worker.trainer.protocol import Metrics, Note, Progress
from worker.trainer.run import Run

_PROGRESS_S = 0.4
_WINDOW_STEPS = 20
_LOGGED = ("loss", "perplexity", "grad_norm", "learning_rate", "epoch", "mean_token_accuracy", "entropy")


class Reporter(TrainerCallback):
    """One run's callback. `final` is set while the last evaluation runs, which may be broken off."""

    def __init__(self, run: Run, trainer: Trainer):
        self._run = run
        self._trainer = trainer
        self._pace: deque[tuple[int, float]] = deque(maxlen=_WINDOW_STEPS)
        self._begun = time.monotonic()
        self._spent_s = 0.0
        self._told = 0.0
        self.final = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where the run starts."""
        self._run.send(Progress(state.global_step, state.max_steps))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step."""
        self._begun = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step, report progress, and stop the run if its loss or its supervisor says so."""
        self._trainer.meter.close()
        reason = self._run.wishes.reason()
        due = control.should_log or control.should_save or control.should_evaluate
        last = control.should_training_stop or state.global_step >= state.max_steps
        first = "claim_to_first_step_s" not in self._run.report and self._run.spec.claimed_at is not None
        self._settle(state, wait=due or last or first or reason is not None)
        if first:
            self._time_start()
        self._report_progress(state)
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif reason is not None:
            self._run.send(Note("run.drained", f"leaving after step {state.global_step}: {reason}"))
            control.should_save = control.should_training_stop = True

    def _time_start(self) -> None:
        claimed_at = self._run.spec.claimed_at
        if claimed_at is not None:
            self._run.report["claim_to_first_step_s"] = round(time.monotonic() - claimed_at, 3)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Know every step before what an epoch ends with."""
        self._begun = time.monotonic()
        self._settle(state, wait=True)

    def _settle(self, state: TrainerState, *, wait: bool) -> None:
        """Count the steps that the device has done. Nothing is logged or saved while one of them is not known."""
        settled = self._trainer.meter.settled(wait=wait)
        now = time.monotonic()
        self._spent_s, self._begun = self._spent_s + now - self._begun, now
        for facts in settled:
            if not math.isfinite(facts.loss):
                raise diverged(f"the loss is {facts.loss} at step {self._run.counters.steps + 1}")
            # Steps that ended unseen share the time since.
            seconds = self._spent_s / len(settled)
            self._run.counters.add(facts, seconds)
            self._stop_an_explosion(facts.loss, self._run.counters.steps)
            self._pace.append((facts.tokens, seconds))
        if settled:
            self._spent_s = 0.0

    def _stop_an_explosion(self, loss: float, step: int) -> None:
        trend, ratio = self._run.trend, self._run.options.max_loss_ratio
        trend.see(loss)
        if trend.exploded(ratio):
            raise diverged(
                f"the loss has exploded: {trend.level:.4g} at step {step} (median of {len(trend.recent)} steps), "
                f"more than {ratio:g} times the lowest before, {trend.lowest:.4g}"
            )

    def _report_progress(self, state: TrainerState) -> None:
        now = time.monotonic()
        if now - self._told < _PROGRESS_S and state.global_step < state.max_steps:
            return
        if not self._pace:
            return
        self._told = now
        tokens, seconds = map(sum, zip(*self._pace, strict=True))
        left = (state.max_steps - state.global_step) * seconds / len(self._pace)
        rate = round(tokens / seconds, 1) if seconds else None
        self._run.send(Progress(state.global_step, state.max_steps, rate, round(left, 1)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report the values of a log entry; the loss is the mean since the one before, over resumes as well.

        TRL's accuracy and entropy are means too, but of this process: the first entry after a resume has fewer steps.
        """
        logs = logs or {}
        if "loss" in logs:
            self._publish("train", state.global_step, logs | {"loss": self._run.counters.take_window()})
        elif "eval_loss" in logs:
            values = {name.removeprefix("eval_"): value for name, value in logs.items()}
            self._publish("eval", state.global_step, values | {"perplexity": perplexity(values["loss"])})

    def _publish(self, kind: str, step: int, logs: dict[str, Any]) -> None:
        # The gradient norm of a step that fp16's loss scaler skipped is not finite, and JSON has no word for it.
        values = {name: float(logs[name]) for name in _LOGGED if name in logs and math.isfinite(logs[name])}
        self._run.metrics.append({"step": step, "kind": kind, **values})
        self._run.send(Metrics(step, values, kind))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the last evaluation be broken off: the checkpoint of the last step is sealed by then."""
        if self.final:
            self._run.wishes.leave_if_asked()


def perplexity(loss: float) -> float:
    """Return the exponential of a loss in nats per token, as large as a float can be."""
    return math.exp(min(loss, 700.0))
