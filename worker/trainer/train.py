"""Second stage: train, and report while doing so. A checkpoint is sealed at each save; a wish to stop is a save too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PrinterCallback

from worker.ml.adapters import hidden
from worker.ml.arguments import sft_config
from worker.ml.checkpoint import BadCheckpoint
from worker.ml.data import sequence_lengths
from worker.ml.memory import peak_bytes, reset_peak
from worker.ml.order import EpochOrder
from worker.ml.sft import Trainer
from worker.trainer.epochs import EpochEnds
from worker.trainer.faults import CRASHED, Drained, classify
from worker.trainer.keeping import Keeper, take_up
from worker.trainer.prepare import versions
from worker.trainer.reporting import Reporter
from worker.trainer.run import Run
from worker.trainer.sampling import Sampler


def train(run: Run) -> None:
    """Train to the last step.

    Raises:
        BadCheckpoint: what the run was to go on from cannot be loaded.
        Drained: the supervisor asked to stop; the state of the step reached is in a sealed checkpoint.
        Diverged: the loss is not a number any more.
    """
    reset_peak(run.device)
    run.trainer = build_trainer(run)
    checkpoint = run.folder / run.spec.resume_from if run.spec.resume_from else None
    if checkpoint:
        take_up(run, checkpoint)
    if checkpoint and (run.counters.steps >= run.options.total_steps or run.stopped_early()):
        # Interrupted after its last step: the library would take one step too many.
        with _loading(run):
            run.trainer.load_weights(checkpoint)
    else:
        with _loading(run):
            run.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if run.counters.steps < run.options.total_steps and not run.stopped_early():
            raise Drained(run.wishes.reason())
    _summarize(run)


@contextmanager
def _loading(run: Run) -> Iterator[None]:
    """Blame a checkpoint of other libraries for what breaks before the first step after it."""
    try:
        yield
    except Exception as error:
        found = run.resumed
        if found is None or run.counters.steps > found.step or found.versions == versions():
            raise
        if classify(error)[0] != CRASHED:
            raise
        message = f"it was made with other versions of the libraries, which cannot load it ({type(error).__name__})"
        raise BadCheckpoint(message) from error


def build_trainer(run: Run) -> Trainer:
    """Return the trainer of a prepared run, with its reporter attached."""
    arguments = sft_config(
        run.options,
        run.precision,
        run.device,
        optim=run.optim,
        folder=run.folder / "partial",
        seed=run.job.seed,
        evaluated=run.eval_rows is not None,
        fused=run.fused is not None,
    )
    with hidden(run.model):
        trainer = Trainer(
            model=run.model,
            args=arguments,
            train_dataset=run.train_rows,
            eval_dataset=run.eval_rows,
            processing_class=run.tokenizer,
            order=_order(run),
            fused=run.fused,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(run, trainer))
    trainer.add_callback(EpochEnds(run.job.hyperparameters, run.eval_rows is not None))
    trainer.add_callback(Sampler(run, trainer))
    trainer.add_callback(Keeper(run))
    return trainer


def _order(run: Run) -> EpochOrder:
    lengths = sequence_lengths(run.train_rows) if run.options.group_by_length else None
    effective = run.options.micro_batch * run.options.accumulation
    return EpochOrder(len(run.train_rows), run.job.seed, lengths, effective)


def _summarize(run: Run) -> None:
    counters, peak = run.counters, peak_bytes(run.device)
    if "memory" in run.report:
        foreseen = run.report["memory"]["estimated_bytes"]
        run.report["memory"] |= {"measured_bytes": peak, "error": round(foreseen / peak - 1, 4)}
    run.report |= {
        "steps": counters.steps,
        "tokens_trained": counters.tokens,
        "loss_tokens_trained": counters.trained_tokens,
        "first_loss": counters.first_loss,
        "final_loss": counters.last_loss,
        "mean_loss": counters.loss_sum / max(1, counters.steps),
        "train_s": round(counters.train_s, 3),
        "tokens_per_s": round(counters.tokens / counters.train_s, 3) if counters.train_s else None,
        "peak_memory_bytes": peak,
        "checkpointed_layers": run.trainer.checkpointed_layers(),
    }
