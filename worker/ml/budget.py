"""Fits a run to its device before anything is loaded: what the memory will come to, and what "auto" means here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from common.memory import fitting
from common.memory.estimate import Estimate, estimate
from common.memory.fitting import BatchPlan, Fit, Rows
from common.memory.fused import LARGE_STEP, parts_of
from common.memory.setup import Setup, read_setup
from common.memory.shape import Shape
from common.schemas.jobs import JobSpec
from worker.ml.arguments import choose_optimizer
from worker.ml.kernels.budget import bytes_of
from worker.ml.kernels.fused import Fused
from worker.ml.kernels.layer import Recompute
from worker.ml.memory import free_bytes
from worker.ml.options import Choice, Options
from worker.ml.precision import choose_precision


def device_setup(job: JobSpec, shape: Shape, device: torch.device) -> Setup:
    """Return how `job` is held on `device`, with the formats and the optimizer that it has there."""
    asked = job.hyperparameters.optim
    optim, _ = choose_optimizer("adamw_torch_fused" if asked == "auto" else asked, device)
    return read_setup(job, shape, optim=optim, element=choose_precision(job, device).compute.itemsize)


def fit_to(job: JobSpec, shape: Shape, rows: Rows, device: torch.device, held_bytes: int = 0) -> Fit:
    """Return what the job leaves to the worker, chosen for what is free on `device` now.

    Args:
        held_bytes: what this process holds there already, of the memory that is counted: its base.
    """
    wish, free = fitting.read_wish(job.hyperparameters), free_bytes(device) + held_bytes
    return fitting.choose(wish, device_setup(job, shape, device), rows, free, device=device.type)


def tightness(job: JobSpec, fit: Fit, device: torch.device, held_bytes: int = 0) -> tuple[Choice, ...]:
    """Return a warning where no plan fits."""
    if fit.fits:
        return ()
    needed, free = fit.estimate.allocated_bytes, free_bytes(device) + held_bytes
    free = fitting.read_wish(job.hyperparameters).room(free)
    message = (
        f"about {needed / 2**30:.1f} GiB are needed, and {free / 2**30:.1f} GiB may be taken: it may run out of memory"
    )
    return (Choice("memory.tight", message, {"needed_bytes": needed, "free_bytes": free}, "warning"),)


def estimated(
    job: JobSpec, shape: Shape, rows: Rows, options: Options, device: torch.device, held_bytes: int = 0
) -> dict[str, Any]:
    """Return the estimate of a run with its settled options, as the report keeps it beside what is measured."""
    plan = BatchPlan(options.micro_batch, options.accumulation, options.checkpointing)
    setup = device_setup(job, shape, device)
    room = int((free_bytes(device) + held_bytes) * fitting.WEIGHTS_SHARE)
    batch = fitting.batch_of(plan, setup, rows)
    found = estimate(setup, batch, device=device.type, room=room)
    sizes = {"rows": batch.rows, "length": batch.length, "checkpointed_layers": batch.checkpointed}
    return {"estimated": found.as_dict(), "estimated_bytes": comparable(found, device), "batch": sizes}


def fused_estimated(
    job: JobSpec, shape: Shape, options: Options, lengths: Sequence[int], path: Fused, device: torch.device
) -> dict[str, Any]:
    """Return the estimate of a run on the fast path, from how it will cut its largest step; `lengths`: of all rows."""
    many, mean = options.micro_batch * options.accumulation, sum(lengths) / max(1, len(lengths))
    # Without groups a step of many long rows is seldom.
    step = sorted(lengths)[-many:] if options.group_by_length else [math.ceil(mean * LARGE_STEP)] * many
    plan = path.plan(step)
    ends = list(accumulate(plan.sizes, initial=0))
    pieces = [sum(step[begin:end]) for begin, end in pairwise(ends)]
    size, tokens, ways = max(
        zip(plan.sizes, pieces, plan.ways, strict=True), key=lambda piece: bytes_of(piece[1], piece[2], path.costs)
    )
    setup, each = device_setup(job, shape, device), path.costs
    passing = tokens * each.working
    kept = bytes_of(tokens, ways, each) - passing - each.fixed
    dense = shape.linear_weights * 2 if path.resident else 0
    found = parts_of(setup, dense, kept, passing, each.fixed, device=device.type)
    sizes = {"rows": size, "length": max(step), "checkpointed_layers": ways.count(Recompute.ALL)}
    return {"estimated": found.as_dict(), "estimated_bytes": comparable(found, device), "batch": sizes}


def comparable(found: Estimate, device: torch.device) -> int:
    """Return what a measured peak is compared with: torch's share of a card, or all of a process on the CPU."""
    return found.allocated_bytes if device.type == "cuda" else found.total_bytes
