"""Settles every hyperparameter of a job: what `"auto"` means here, and how the out-of-memory ladder changes the batch.

No torch: the preflight settles the same values to estimate the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from common.memory.fitting import BatchPlan
from common.schedule import auto_epochs, total_steps
from common.schemas.hyperparameters import Hyperparameters
from common.schemas.jobs import JobSpec
from common.schemas.methods import default_learning_rate

_UNCUT = 1 << 40
_AUTO_PATIENCE = 3
# What "auto" means whatever the data and the device.
_FIXED: dict[str, Any] = {
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "neftune_noise_alpha": 5.0,
    "max_loss_ratio": 3.0,
}
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """Something that was settled on the worker: an event of the job, in words and as data."""

    name: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    level: str = "info"


@dataclass(frozen=True)
class Options:
    """Every hyperparameter with its final value. Batch sizes are in rows, lengths in tokens.

    `checkpointing`: every how many layers activations are recomputed, 0 for none. `packing`: bfd, wrapped or None.
    `patience`: evaluations without an improvement by more than `threshold` after which the run stops, 0 for never;
    `keep_best`: what is published are the weights of the best evaluation. `max_loss_ratio`: see `worker.ml.trend`.
    """

    num_train_epochs: float
    max_steps: int
    learning_rate: float
    micro_batch: int
    accumulation: int
    max_length: int
    save_steps: int
    eval_steps: int
    logging_steps: int
    warmup: int | float
    lr_scheduler_type: str
    weight_decay: float
    max_grad_norm: float
    optim: str
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    neftune_noise_alpha: float
    checkpointing: int
    group_by_length: bool
    packing: str | None
    patience: int
    threshold: float
    keep_best: bool
    max_loss_ratio: float
    total_steps: int
    choices: tuple[Choice, ...] = ()


class _Resolver:
    # Replaces "auto" and remembers having done so.

    def __init__(self, values: Hyperparameters):
        self._values = values
        self.chosen: dict[str, Any] = {}

    def pick(self, name: str, default: T) -> T:
        value = getattr(self._values, name)
        if value != "auto":
            return value
        self.chosen[name] = default
        return default


def row_limit(values: Hyperparameters, max_length: int) -> int:
    """Return the tokens after which a training row is cut: wrapped packing cuts rows itself, and loses nothing."""
    return _UNCUT if values.packing == "wrapped" else max_length


def default_plan(*, cuda: bool) -> BatchPlan:
    """Return what "auto" means where nothing is known of the base's memory."""
    return BatchPlan(4, 4, int(cuda))


def settle(
    job: JobSpec,
    *,
    num_rows: int,
    max_length: int,
    cuda: bool,
    shrink: int = 0,
    num_packed: int | None = None,
    plan: BatchPlan | None = None,
) -> Options:
    """Return the options of a run.

    Args:
        num_rows: rows of the training file that have something to learn.
        max_length: as `resolve_max_length` returned it.
        shrink: steps down the out-of-memory ladder.
        num_packed: sequences after packing, once known; None while estimating.
        plan: what "auto" means for batch and checkpointing on this device.
    """
    resolver = _Resolver(job.hyperparameters)
    pick = resolver.pick
    asked_packing = pick("packing", False)
    packing = "bfd" if asked_packing is True else asked_packing or None
    sequences = num_packed if packing and num_packed is not None else num_rows
    plan = plan or default_plan(cuda=cuda)
    micro = pick("per_device_train_batch_size", plan.micro_batch)
    accumulation = pick("gradient_accumulation_steps", plan.accumulation)
    epochs = pick("num_train_epochs", auto_epochs(num_rows))
    fixed = {name: pick(name, default) for name, default in _FIXED.items()}
    steps = total_steps(sequences, micro, accumulation, epochs, fixed["max_steps"])
    checkpointing = int(pick("gradient_checkpointing", plan.checkpointing))
    micro_batch, accumulated, checkpointed = shrunk(micro, accumulation, checkpointing, shrink)
    keep_best = job.hyperparameters.load_best_model_at_end
    patience = pick("early_stopping_patience", _AUTO_PATIENCE if job.validated else 0)
    if job.hyperparameters.max_length == "auto":
        resolver.chosen["max_length"] = max_length
    picked = Options(
        num_train_epochs=epochs,
        learning_rate=pick("learning_rate", default_learning_rate(job.method)),
        micro_batch=micro_batch,
        accumulation=accumulated,
        max_length=max_length,
        save_steps=pick("save_steps", min(max(steps // 10, 20), 500)),
        eval_steps=pick("eval_steps", min(max(steps // 10, 10), 500)),
        logging_steps=pick("logging_steps", 1 if steps < 50 else 10),
        warmup=pick("warmup_steps", 0) or pick("warmup_ratio", 0.03),
        checkpointing=checkpointed,
        group_by_length=pick("group_by_length", packing is None),
        packing=packing,
        patience=patience,
        threshold=pick("early_stopping_threshold", 0.0),
        keep_best=patience > 0 if keep_best == "auto" else keep_best,
        total_steps=steps,
        **fixed,
    )
    choices = _auto_choices(resolver.chosen)
    if shrink:
        choices.append(_shrink_choice(shrink, micro, accumulation, micro_batch, accumulated, checkpointed))
    return replace(picked, choices=tuple(choices))


def shrunk(micro: int, accumulation: int, checkpointing: int, shrink: int) -> tuple[int, int, int]:
    """Return (micro-batch, accumulation, checkpointing) after `shrink` steps down the out-of-memory ladder.

    The micro-batch is halved while that is possible, at the same number of rows per optimizer step; a step that finds
    nothing to halve turns checkpointing on for every layer.
    """
    effective = micro * accumulation
    for _ in range(shrink):
        if micro == 1:
            checkpointing = 1
        else:
            micro = next(size for size in range(micro // 2, 0, -1) if effective % size == 0)
    return micro, effective // micro, checkpointing


def _auto_choices(chosen: dict[str, Any]) -> list[Choice]:
    if not chosen:
        return []
    listed = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return [Choice("auto.resolved", f"chosen for you: {listed}", chosen)]


def _shrink_choice(shrink: int, old: int, old_steps: int, new: int, new_steps: int, checkpointing: int) -> Choice:
    return Choice(
        "memory.shrunk",
        f"out of memory before, so step {shrink} of the ladder: micro-batch {old} → {new}, accumulation {old_steps} → "
        f"{new_steps} (the effective batch stays {new * new_steps}), gradient checkpointing "
        f"{'on' if checkpointing else 'off'}",
        {
            "shrink": shrink,
            "micro_batch": new,
            "accumulation": new_steps,
            "gradient_checkpointing": bool(checkpointing),
        },
        "warning",
    )
