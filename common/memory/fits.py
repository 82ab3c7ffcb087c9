"""Whether a job fits the cards of the workers that are known."""

from __future__ import annotations

from collections.abc import Sequence

from common.memory import fitting
from common.memory.estimate import CONTEXT_BYTES
from common.memory.fitting import BatchPlan, Fit, Rows, Wish
from common.memory.setup import Setup
from common.schemas.estimates import MemoryEstimate, WorkerEstimate
from common.schemas.workers import Worker

_GIB = 2**30


def room(worker: Worker) -> int | None:
    """Return the memory that a job could have on a worker's card: what is free, or all where that is not known."""
    return worker.vram_bytes if worker.free_bytes is None else worker.free_bytes


def on_workers(wish: Wish, setup: Setup, rows: Rows, crew: Sequence[Worker]) -> tuple[MemoryEstimate, BatchPlan]:
    """Return the memory of a job on the card of `crew` that has most free, and its plan; of none, on one of 24 GiB."""
    largest = max((worker for worker in crew if worker.vram_bytes), key=lambda one: room(one) or 0, default=None)
    name = f"a card of {fitting.NOMINAL_BYTES / _GIB:.0f} GiB, for want of a worker with one"
    if largest is not None:
        name = largest.device_name or largest.name
    most = room(largest) if largest is not None else None
    fit = _fit(wish, setup, rows, fitting.NOMINAL_BYTES if most is None else most)
    batch = fit.batch(setup, rows)
    memory = MemoryEstimate(
        device=name,
        rows=batch.rows,
        length=batch.length,
        checkpointed_layers=batch.checkpointed,
        **fit.estimate.as_dict(),
    )
    return memory, fit.plan


def on_worker(wish: Wish, setup: Setup | None, rows: Rows, worker: Worker) -> WorkerEstimate:
    """Return whether a job fits `worker`, and with which plan; `setup` is None where the base is not known."""
    shown = WorkerEstimate(
        id=worker.id,
        name=worker.name,
        state=worker.state,
        device_name=worker.device_name,
        vram_bytes=worker.vram_bytes,
        free_bytes=worker.free_bytes,
        fits=None,
        total_bytes=None,
    )
    if setup is None:
        return shown.model_copy(update={"message": "the memory of the job is not known"})
    there = room(worker)
    if worker.vram_bytes is None or there is None:
        message = "it has no card: it trains on the CPU, in the memory of its machine"
        return shown.model_copy(update={"message": message})
    fit = _fit(wish, setup, rows, there)
    needed = fit.estimate.total_bytes
    told = f"the card has {worker.vram_bytes / _GIB:.1f}"
    if worker.free_bytes is not None:
        told += f", of which {worker.free_bytes / _GIB:.1f} are free"
    if wish.most_bytes is not None and wish.most_bytes < there:
        told = f"max_memory_gib allows {wish.most_bytes / _GIB:.1f}"
    lack = f"about {needed / _GIB:.1f} GiB are needed, and {told}"
    return shown.model_copy(
        update={
            "fits": fit.fits,
            "total_bytes": needed,
            "per_device_train_batch_size": fit.plan.micro_batch,
            "gradient_accumulation_steps": fit.plan.accumulation,
            "gradient_checkpointing": fit.plan.checkpointing,
            "message": None if fit.fits else lack,
        }
    )


def _fit(wish: Wish, setup: Setup, rows: Rows, vram_bytes: int) -> Fit:
    return fitting.choose(wish, setup, rows, vram_bytes - CONTEXT_BYTES["cuda"])
