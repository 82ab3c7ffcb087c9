"""Third stage: the loss on the validation rows after the last step."""

from __future__ import annotations

import math

from worker.trainer.reporting import Reporter
from worker.trainer.run import Run


def evaluate(run: Run) -> None:
    """Evaluate once more at the end, unless the last step was evaluated anyway; nothing without validation rows."""
    if run.eval_rows is None:
        return
    last = run.options.total_steps
    if not any(entry["kind"] == "eval" and entry["step"] == last for entry in run.metrics):
        for callback in run.trainer.callback_handler.callbacks:
            if isinstance(callback, Reporter):
                callback.final = True
        run.trainer.evaluate()
    losses = [entry["loss"] for entry in run.metrics if entry["kind"] == "eval"]
    run.report |= {
        "eval_loss": losses[-1],
        "eval_perplexity": math.exp(min(losses[-1], 700.0)),
        "best_eval_loss": min(losses),
    }
