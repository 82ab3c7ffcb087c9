"""How a step is cut and what its layers recompute, from the memory that activations may take.

Pure numbers. Fewer, larger micro-batches dequantise the base less often; recomputing costs products.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.ml.kernels.layer import Recompute
from worker.ml.kernels.rows import group_rows

Ways = tuple[Recompute, ...]

# What a pass over the weights costs besides its products (dequantising them, twice), in tokens' worth of products.
_PASS_TOKENS = 400
# The host needs about as long to launch a pass as the card for so many tokens; fewer are no faster.
_LEAST_TOKENS = 2600
# Of the forward products of a layer, the part that recomputing its MLP's gate and up repeats, and the whole.
_REPEATED = {Recompute.NOTHING: 0.0, Recompute.MLP: 0.54, Recompute.ALL: 0.73}


@dataclass(frozen=True)
class Costs:
    """Bytes: `kept` by a token in a layer, by what that recomputes; `working` by a token once; `fixed` in any case."""

    layers: int
    kept: dict[Recompute, int]
    working: int
    fixed: int
    pass_tokens: int = _PASS_TOKENS
    least_tokens: int = _LEAST_TOKENS


@dataclass(frozen=True)
class StepPlan:
    """`sizes`: rows in each micro-batch; `ways`: what each layer recomputes, for each micro-batch."""

    sizes: list[int]
    ways: list[Ways]


def plan_step(lengths: list[int], costs: Costs, room: int, least: Ways) -> StepPlan:
    """Return the cheapest way to run rows of `lengths` tokens within `room` bytes.

    Args:
        least: what each layer recomputes in any case.
    """
    best: tuple[float, StepPlan] | None = None
    total = sum(lengths)
    for count in range(1, len(lengths) + 1):
        sizes = group_rows(lengths, max(max(lengths), -(-total // count)))
        tokens = _tokens(lengths, sizes)
        ways = [layer_ways(number, costs, room, least) for number in tokens]
        spent = sum(
            max(costs.least_tokens, number * (1 + sum(_REPEATED[way] for way in chosen) / costs.layers / 2))
            + costs.pass_tokens
            for number, chosen in zip(tokens, ways, strict=True)
        )
        # Where nothing fits, the most pieces are the best that there is.
        if any(not fits(number, chosen, costs, room) for number, chosen in zip(tokens, ways, strict=True)):
            spent += total
        if best is None or spent < best[0]:
            best = spent, StepPlan(sizes, ways)
        if all(chosen == least for chosen in ways):
            break
    assert best is not None
    return best[1]


def _tokens(lengths: list[int], sizes: list[int]) -> list[int]:
    found, at = [], 0
    for size in sizes:
        found.append(sum(lengths[at : at + size]))
        at += size
    return found


def layer_ways(tokens: int, costs: Costs, room: int, least: Ways) -> Ways:
    """Return what each layer recomputes, so that `tokens` fit into `room` bytes where that is possible.

    The first layers recompute the most: what the last ones keep is needed, and freed, first.
    """
    ways = list(least)
    for way in (Recompute.MLP, Recompute.ALL):
        for index in range(costs.layers):
            if fits(tokens, tuple(ways), costs, room):
                return tuple(ways)
            ways[index] = max(ways[index], way)
    return tuple(ways)


def fits(tokens: int, ways: Ways, costs: Costs, room: int) -> bool:
    """Return whether `tokens` in one micro-batch fit into `room` bytes."""
    return bytes_of(tokens, ways, costs) <= room


def bytes_of(tokens: int, ways: Ways, costs: Costs) -> int:
    """Return the bytes that a micro-batch of `tokens` takes at its peak."""
    # The last layer is the first to run backward, beside everything that the others kept.
    again = costs.kept[Recompute.NOTHING] - costs.kept[ways[-1]]
    return tokens * (sum(costs.kept[way] for way in ways) + again + costs.working) + costs.fixed
