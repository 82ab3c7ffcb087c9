"""What will go wrong, in which order and for how long: a function of a seed.

The order is drawn like cards from a deck without putting them back, so that even a short run meets most kinds. At which
microsecond a fault meets the service is not repeatable; that is why there are many.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WAYS_TO_BREAK = ("reset", "refuse", "half_open", "stall", "delay")
# How many cards of each (what, whom). `trainer` and `worker` mean one that is training at that moment.
_DECK: dict[tuple[str, str], int] = {
    ("kill", "trainer"): 16,
    ("kill", "worker"): 16,
    ("kill", "api"): 6,
    ("kill", "sweeper"): 5,
    ("kill", "preflight"): 5,
    ("kill", "valkey"): 4,
    ("wipe", "valkey"): 4,
    ("kill", "seaweedfs"): 3,
    ("drain", "worker"): 4,
    # The host of a worker: itself and its trainer. The worker alone: then the trainer must leave by itself.
    ("freeze", "host"): 5,
    ("freeze", "worker"): 4,
    ("freeze", "trainer"): 3,
    ("freeze", "sweeper"): 2,
    ("freeze", "api"): 2,
    ("fill", "disk"): 3,
    **{(way, part): 2 for way in WAYS_TO_BREAK for part in ("broker", "store")},
}
_DECK_OF_POSTGRES: dict[tuple[str, str], int] = {
    ("kill", "postgres"): 3,
    **{(way, "database"): 2 for way in WAYS_TO_BREAK},
}


@dataclass(frozen=True)
class Fault:
    """One fault: it comes `after_s` seconds after the one before, and ends after `lasts_s` (0: it is a moment)."""

    number: int
    what: str
    whom: str
    after_s: float
    lasts_s: float


def schedule(
    seed: int, database: str, num_faults: int, *, mean_s: float, lease_s: float, with_disk: bool
) -> list[Fault]:
    """Return the faults of a run; their pauses are `mean_s` seconds on average."""
    randomness = random.Random(f"{seed} {database} schedule")
    weights = _DECK | (_DECK_OF_POSTGRES if database == "postgres" else {})
    cards = [card for card, count in weights.items() for _ in range(count) if with_disk or card != ("fill", "disk")]
    deck: list[tuple[str, str]] = []
    faults = []
    for number in range(num_faults):
        deck = deck or randomness.sample(cards, len(cards))
        what, whom = deck.pop()
        lasts_s = _lasts_s(randomness, what, lease_s)
        faults.append(Fault(number, what, whom, randomness.uniform(0.2, 2 * mean_s - 0.2), lasts_s))
    return faults


def _lasts_s(randomness: random.Random, what: str, lease_s: float) -> float:
    if what == "freeze":
        return lease_s + randomness.uniform(0.5, 2.5)
    if what in (*WAYS_TO_BREAK[1:], "fill"):
        return randomness.uniform(0.5, lease_s + 2)
    return 0.0
