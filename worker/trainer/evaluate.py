"""Third stage: the loss on the validation rows after the last step, and which step's weights are published."""

from __future__ import annotations

from worker.ml.best import take_weights
from worker.trainer.protocol import Note
from worker.trainer.reporting import Reporter, perplexity
from worker.trainer.run import Run


def evaluate(run: Run) -> None:
    """Evaluate once more at the end, unless the last step was evaluated anyway; nothing without validation rows."""
    if run.eval_rows is None:
        return
    last = run.counters.steps
    if not any(entry["kind"] == "eval" and entry["step"] == last for entry in run.metrics):
        for callback in run.trainer.callback_handler.callbacks:
            if isinstance(callback, Reporter):
                callback.final = True
        run.trainer.evaluate()
    evaluations = [entry for entry in run.metrics if entry["kind"] == "eval"]
    run.report |= {
        "eval_loss": evaluations[-1]["loss"],
        "eval_perplexity": perplexity(evaluations[-1]["loss"]),
        "eval_token_accuracy": evaluations[-1].get("mean_token_accuracy"),
        "best_eval_loss": run.best.loss,
        "best_step": run.best.step,
        "published_step": last,
    }
    if run.options.keep_best and run.best.step != last:
        _take_best(run, evaluations[-1]["loss"])


def _take_best(run: Run, last_loss: float) -> None:
    take_weights(run.model, run.best_weights)
    run.report["published_step"] = run.best.step
    message = (
        f"the weights of step {run.best.step} are published: their validation loss is {run.best.loss:.4f}, "
        f"the last step's {last_loss:.4f}"
    )
    run.send(Note("best.taken", message, data={"step": run.best.step, "loss": run.best.loss}))
