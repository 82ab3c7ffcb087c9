"""Chooses micro-batch and checkpointing so that a step fits a card, from what is free on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from common.memory import fused
from common.memory.estimate import Batch, Estimate, estimate
from common.memory.setup import Setup
from common.schemas.hyperparameters import Hyperparameters

# Rows of an optimizer step where "auto" leaves the batch to the worker.
EFFECTIVE_ROWS = 16
# Of what is free; the rest is for what the estimate may be wrong by. Measured peaks are within 3 % of it.
USABLE = 0.92
# A card for which a plan is made where none is known.
NOMINAL_BYTES = 24 * 2**30
# Of what is free, for the weights, where layers may wait in host memory.
WEIGHTS_SHARE = 0.6
# Recomputing every layer costs a third of a step (measured: 1,929 against 2,933 tokens/s).
_RECOMPUTING = 1 / 3
# A card waits for the program in smaller micro-batches (measured on an H100: 5,343 tokens/s at 4k, 14,152 at 8k), so a
# larger one is worth recomputing for; beyond it is not. A CPU waits for nothing.
_TOKENS_ENOUGH = 6144
_CPU_ROWS = 4


@dataclass(frozen=True)
class BatchPlan:
    """What was chosen: `micro_batch` rows a pass, and `accumulation` passes a step.

    Every `checkpointing`-th layer recomputes its activations; 0: none.
    """

    micro_batch: int
    accumulation: int
    checkpointing: int


@dataclass(frozen=True)
class Wish:
    """What a job asks for: a number is kept, None ("auto") is chosen. `most_bytes` is the most memory it may take."""

    micro_batch: int | None
    accumulation: int | None
    checkpointing: int | None
    most_bytes: int | None = None

    def room(self, free_bytes: int) -> int:
        """Return what the run may take of what is free."""
        return free_bytes if self.most_bytes is None else min(free_bytes, self.most_bytes)


@dataclass(frozen=True)
class Rows:
    """The lengths of rows in tokens: the longest and the mean. `equal`: all have the longest, as `packed` ones do.

    `varlen` and `fused` are those of `Batch`.
    """

    longest: int
    mean: float
    packed: bool = False
    equal: bool = False
    varlen: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Fit:
    """A plan, its estimate, and whether that fits; `cut`: how the fast path cuts a step, where it is taken."""

    plan: BatchPlan
    estimate: Estimate
    fits: bool
    cut: fused.Cut | None = None

    def batch(self, setup: Setup, rows: Rows) -> Batch:
        """Return the largest micro-batch."""
        if self.cut is None:
            return batch_of(self.plan, setup, rows)
        return Batch(max(1, self.cut.tokens // max(1, rows.longest)), rows.longest, self.cut.all)


def read_wish(asked: Hyperparameters) -> Wish:
    """Return what `asked` leaves open; `true` means checkpointing of every layer, `false` of none."""
    micro, accumulation = asked.per_device_train_batch_size, asked.gradient_accumulation_steps
    checkpointing, most_gib = asked.gradient_checkpointing, asked.max_memory_gib
    return Wish(
        None if micro == "auto" else micro,
        None if accumulation == "auto" else accumulation,
        None if checkpointing == "auto" else int(checkpointing),
        None if most_gib == "auto" else int(most_gib * 2**30),
    )


def read_rows(asked: Hyperparameters, *, longest: int, mean: float, max_length: int) -> Rows:
    """Return the rows of a micro-batch. Lengths are in tokens: `longest` before `max_length` cuts it, `mean` after."""
    if asked.packing not in (False, "auto"):
        return Rows(max_length, max_length, packed=True, equal=True)
    longest = min(longest, max_length)
    return Rows(longest, min(mean, max_length), equal=mean >= longest)


def choose(wish: Wish, setup: Setup, rows: Rows, free_bytes: int, *, device: str = "cuda") -> Fit:
    """Return the plan for a device with `free_bytes` left: of those that fit, the one that should be fastest.

    Of two equally fast, the larger micro-batch. Where nothing fits, the smallest: then the ladder down from a lack of
    memory decides. A pure function of its arguments, so that equal cards choose alike.

    Args:
        free_bytes: what is free, the device's context not counted.
    """
    free_bytes = wish.room(free_bytes)
    search = _Search(wish, setup, rows, device, free_bytes)
    fitting = [fit for fit in search.fits if fit.fits]
    smallest = min(search.fits, key=lambda fit: fit.estimate.allocated_bytes)
    found = min(fitting, key=search.cost) if fitting else smallest
    most = setup.shape.fusable_length
    fast = setup.fused and device == "cuda" and (most is None or rows.longest <= most)
    return _on_the_fast_path(found, wish, setup, rows, free_bytes) if fast else found


def _on_the_fast_path(found: Fit, wish: Wish, setup: Setup, rows: Rows, free_bytes: int) -> Fit:
    # The plan stays: it says how many rows a step has, and how an evaluation, which takes the plain path, is cut.
    many = found.plan.micro_batch * found.plan.accumulation
    step = fused.Step(many, rows.longest, rows.mean, automatic=wish.checkpointing != 1)
    foreseen, cut = fused.estimate(setup, step, free_bytes)
    return Fit(found.plan, foreseen, cut.fits, cut)


def checkpointed(layers: int, every: int) -> int:
    """Return how many of `layers` recompute where every `every`-th does, the first included."""
    return -(-layers // every) if every else 0


def batch_of(plan: BatchPlan, setup: Setup, rows: Rows) -> Batch:
    """Return the largest micro-batch of a run under `plan`."""
    return Batch(
        rows=plan.micro_batch,
        length=rows.longest,
        checkpointed=checkpointed(setup.shape.layers, plan.checkpointing),
        packed=rows.packed,
        equal=rows.equal,
        varlen=rows.varlen,
        fused=rows.fused,
    )


@dataclass(frozen=True)
class _Search:
    wish: Wish
    setup: Setup
    rows: Rows
    device: str
    free_bytes: int

    @cached_property
    def fits(self) -> list[Fit]:
        """Every plan that the wish allows."""
        return [self._fit(plan) for plan in self._plans()]

    def cost(self, fit: Fit) -> tuple[float, int]:
        """Return the relative time that a token takes, and what decides between equals: the larger micro-batch."""
        share = checkpointed(self.setup.shape.layers, fit.plan.checkpointing) / self.setup.shape.layers
        tokens = fit.plan.micro_batch * (self.rows.longest if self.rows.packed else self.rows.mean)
        idle = max(1.0, _TOKENS_ENOUGH / max(1.0, tokens)) if self.device == "cuda" else 1.0
        return (idle * (1 + share * _RECOMPUTING), -fit.plan.micro_batch)

    def _plans(self) -> Iterator[BatchPlan]:
        layers, wish = self.setup.shape.layers, self.wish
        every = [0, *range(layers, 0, -1)] if wish.checkpointing is None else [wish.checkpointing]
        # Where layers wait in host memory, each has to be recomputed.
        every = [1] if self.setup.offloads and wish.checkpointing is None else every
        for micro, accumulation in _batches(wish, self.device):
            seen: set[int] = set()
            for number in every:
                count = checkpointed(layers, number)
                if count not in seen:
                    seen.add(count)
                    yield BatchPlan(micro, accumulation, number)

    def _fit(self, plan: BatchPlan) -> Fit:
        batch, room = batch_of(plan, self.setup, self.rows), int(self.free_bytes * WEIGHTS_SHARE)
        found = estimate(self.setup, batch, device=self.device, room=room)
        return Fit(plan, found, found.allocated_bytes <= self.free_bytes * USABLE)


def _batches(wish: Wish, device: str) -> list[tuple[int, int]]:
    """Return (micro-batch, accumulation) for 16 rows a step, or, where one is given, as near as whole numbers come."""
    micro, accumulation = wish.micro_batch, wish.accumulation
    if micro is not None:
        return [(micro, accumulation or max(1, round(EFFECTIVE_ROWS / micro)))]
    most = _CPU_ROWS if device == "cpu" else EFFECTIVE_ROWS
    if accumulation is not None:
        return [(size, accumulation) for size in range(min(most, max(1, EFFECTIVE_ROWS // accumulation)), 0, -1)]
    return [(size, EFFECTIVE_ROWS // size) for size in range(most, 0, -1) if EFFECTIVE_ROWS % size == 0]
