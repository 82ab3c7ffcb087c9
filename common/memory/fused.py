"""What a run takes on the fast path (`worker/ml/kernels`), which cuts each step to the memory that there is.

The rows of a step lie end to end without padding, in as few pieces as fit; a layer recomputes nothing, its MLP, or all.
The bytes are those that `worker.ml.kernels.fused.costs` plans with; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.memory.estimate import CONTEXT_BYTES, Estimate
from common.memory.setup import Setup

# The share of the memory that the fast path leaves to fragments and libraries.
SLACK = 0.03
# Bytes of a trained weight beside the weight: two states, a gradient, and a copy of it while it is clipped, in fp32.
TRAINED_BYTES = 16
# Tokens whose logits the loss holds at once.
HEAD_TOKENS = 1024
# A step of rows in random order is seldom larger than this many times the mean; only such a step has to fit beside the
# dequantised base.
LARGE_STEP = 1.3


@dataclass(frozen=True)
class Costs:
    """Bytes of a piece of a step.

    `nothing`, `mlp` and `all` are what a layer keeps of each token if it recomputes that much; `working` is taken once
    for each token, `fixed` whatever the piece's size.
    """

    nothing: int
    mlp: int
    all: int
    working: int
    fixed: int


@dataclass(frozen=True)
class Cut:
    """The largest piece of a step in tokens, how many layers recompute all and the MLP, and whether that fits."""

    tokens: int
    all: int
    mlp: int
    fits: bool


@dataclass(frozen=True)
class Step:
    """A step's rows: how many, the longest and the mean in tokens; `automatic`: the worker chooses checkpointing."""

    rows: int
    longest: int
    mean: float
    automatic: bool


def costs(setup: Setup) -> Costs:
    """Return the bytes that a piece of a step takes."""
    shape, size = setup.shape, setup.element
    narrow = setup.rank * len(setup.adapted)
    values = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 2 * shape.intermediate + narrow
    nothing = size * values + 4 * shape.heads + 8
    joined = max(2 * shape.hidden * shape.intermediate, shape.hidden * (shape.queries + 2 * shape.keys))
    return Costs(
        nothing=nothing,
        mlp=nothing - size * 2 * shape.intermediate,
        all=size * shape.hidden,
        working=size
        * working_values(shape.hidden, shape.intermediate, shape.queries, shape.keys, head_norm=shape.qk_norm)
        + (2 * shape.intermediate if setup.fp8 else 0),
        fixed=size * (joined + HEAD_TOKENS * shape.vocab),
    )


def working_values(hidden: int, inner: int, queries: int, keys: int, *, head_norm: bool) -> int:
    """Return the values of a token that a layer's backward pass holds at once beside what is kept.

    That is its MLP's part, or attention's where queries are wider than the hidden state: gradients of its output,
    query, key and value, the kernel's sum for the query in 32 bit, keys' and values' gradients of each query's head
    where they are fewer, and query and key made again where they have a norm.
    """
    grouped, again = 2 * queries if keys < queries else 0, queries + keys if head_norm else 0
    return max(inner + 8 * hidden, hidden + 4 * queries + 2 * keys + grouped + again)


def estimate(setup: Setup, step: Step, free_bytes: int) -> tuple[Estimate, Cut]:
    """Return what a run takes of `free_bytes`, and how its largest step is cut."""
    each, layers = costs(setup), setup.shape.layers
    room = _room(setup, free_bytes)
    dense = _dense_bytes(setup, step, each, room)
    cut = _cut(step, each, layers, room - dense)
    activations, passing = cut.tokens * _kept(each, layers, cut.mlp, cut.all), cut.tokens * each.working
    return parts_of(setup, dense, activations, passing, each.fixed), cut


def parts_of(setup: Setup, dense: int, activations: int, passing: int, fixed: int, *, device: str = "cuda") -> Estimate:
    """Return the estimate of a run with `dense` bytes of the base in 16 bit beside its own weights."""
    parts = {
        "weights": setup.weight_bytes,
        "weights_16_bit": dense,
        "adapter": setup.adapter_bytes,
        "gradients": setup.gradient_bytes,
        "optimizer": setup.optimizer_bytes,
        "activations": activations,
        "loss": 0,
        "backward": passing,
        "workspace": fixed,
        "allocator": int(SLACK * (activations + passing)),
        "context": CONTEXT_BYTES[device],
    }
    return Estimate(parts, setup.paged_bytes)


def _kept(each: Costs, layers: int, mlp: int, whole: int) -> int:
    """Return the bytes of a token in all layers, of which the first recompute all, the next the MLP."""
    kept = whole * each.all + mlp * each.mlp + (layers - whole - mlp) * each.nothing
    # The last layer runs backward beside everything that the others kept.
    last = each.all if whole == layers else each.mlp if whole + mlp == layers else each.nothing
    return kept + each.nothing - last


def _room(setup: Setup, free_bytes: int) -> int:
    held = setup.weight_bytes + setup.adapter_bytes
    return int(free_bytes * (1 - SLACK)) - held - setup.trained_parameters * TRAINED_BYTES


def _dense_bytes(setup: Setup, step: Step, each: Costs, room: int) -> int:
    """Return the bytes of the base in 16 bit, or in 8 bit both ways round.

    It is held besides where a usual step recomputes nothing even so.
    """
    if setup.method != "qlora" and not setup.fp8:
        return 0
    dense = setup.shape.linear_weights * 2
    usual = int(step.rows * step.mean * LARGE_STEP)
    whole = usual * (setup.shape.layers * each.nothing + each.working) + each.fixed
    return dense if whole <= room - dense else 0


def _cut(step: Step, each: Costs, layers: int, room: int) -> Cut:
    """Return the first cut that fits, in as few pieces as that takes."""
    for pieces in range(1, step.rows + 1):
        tokens = -(-step.rows // pieces) * step.longest
        for mlp, whole in _ways(layers, automatic=step.automatic):
            if tokens * (_kept(each, layers, mlp, whole) + each.working) + each.fixed <= room:
                return Cut(tokens, whole, mlp, True)
    return Cut(step.longest, layers, 0, False)


def _ways(layers: int, *, automatic: bool) -> list[tuple[int, int]]:
    """Return (layers that recompute the MLP, all), the fewest first."""
    if not automatic:
        return [(0, layers)]
    mlp_only = [(count, 0) for count in range(layers + 1)]
    return mlp_only + [(layers - count, count) for count in range(1, layers + 1)]
