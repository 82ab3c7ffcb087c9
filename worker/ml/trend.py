"""Whether the loss of a run explodes: not a spike, which good runs have, but a level that it does not come back from.

The level is the median over the last steps, so that nearly half of them may be spikes of any height. It is compared
with the lowest level so far, not the first, because a run that had learnt something and lost it has exploded too; three
times the loss is the perplexity to the power of three. Below one nat per token the lowest level counts as one: a model
that knows its data by heart has losses that are small and vary by large factors. A warm-up or a bad start cannot trip
it: they come before the lowest level.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

WINDOW_STEPS = 20
FLOOR_NATS = 1.0


@dataclass
class Trend:
    """The losses of the last steps and the lowest level so far, in nats per trained token; kept in checkpoints."""

    recent: list[float] = field(default_factory=list)
    lowest: float | None = None

    def see(self, loss: float) -> None:
        """Take the loss of a step."""
        self.recent = [*self.recent, loss][-WINDOW_STEPS:]
        if (level := self.level) is not None:
            self.lowest = level if self.lowest is None else min(self.lowest, level)

    @property
    def level(self) -> float | None:
        """The median of the last steps; None before there are enough."""
        return median(self.recent) if len(self.recent) == WINDOW_STEPS else None

    def bound(self, ratio: float) -> float:
        """Return the loss beyond which a step is out of bounds; infinite before anything is known, or with ratio 0."""
        return ratio * max(self.lowest, FLOOR_NATS) if ratio and self.lowest is not None else float("inf")

    def out_of_bounds(self, ratio: float) -> bool:
        """Return whether the last step is: an explosion may have begun with it, or a spike passes."""
        return bool(self.recent) and self.recent[-1] > self.bound(ratio)

    def exploded(self, ratio: float) -> bool:
        """Return whether the level itself is."""
        return self.level is not None and self.level > self.bound(ratio)
