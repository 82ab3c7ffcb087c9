"""An explosion is told from noise, spikes, warm-ups and losses that are next to nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import pytest

from worker.ml.trend import WINDOW_STEPS, Trend

RATIO = 3.0


def fires_at(losses: Iterable[float], ratio: float = RATIO) -> int | None:
    """Return the step (from 1) at which the guard stops the run."""
    trend = Trend()
    for step, loss in enumerate(losses, 1):
        trend.see(loss)
        if trend.exploded(ratio):
            return step
    return None


def curve(seed: int, steps: int, *, first: float, last: float, noise: float) -> list[float]:
    """Return losses that fall as those of a fine-tuning run do, each off by a factor that is drawn anew."""
    draw = random.Random(seed)
    return [
        (last + (first - last) * math.exp(-6 * step / steps)) * math.exp(draw.gauss(0, noise)) for step in range(steps)
    ]


EXPLOSIONS = {
    "to the level of guessing": [*[2.0] * 30, *[10.4] * 30],
    "step by step": [*[1.5] * 30, *(1.5 * 1.15**step for step in range(40))],
    "back to where a random model began": [*(10.4 * 0.9**step for step in range(40)), *[9.0] * 30],
    "of a model that knew its data by heart": [*[0.01] * 40, *[6.0] * 30],
    "with noise": [*curve(1, 50, first=3, last=1.2, noise=0.4), *curve(2, 40, first=11, last=11, noise=0.4)],
}


@pytest.mark.parametrize("losses", EXPLOSIONS.values(), ids=EXPLOSIONS)
def test_an_explosion_is_seen_within_a_window(losses: list[float]):
    step = fires_at(losses)
    assert step is not None
    lowest = min(losses[:step])
    last_good = max(number for number, loss in enumerate(losses[:step], 1) if loss <= RATIO * max(lowest, 1.0))
    assert step <= last_good + WINDOW_STEPS
    assert fires_at(losses, ratio=0) is None and fires_at(losses, ratio=1000.0) is None


QUIET = {
    "constant": [2.0] * 100,
    "spikes of any height": [1e6 if step % 5 == 4 else 1.5 for step in range(200)],
    "a burst of spikes": [*[1.5] * 50, 50, 80, 1e3, 60, *[1.5] * 50],
    "a start at random and a warm-up that rises first": [
        9.0,
        11.0,
        14.0,
        12.0,
        *(10 * 0.9**step for step in range(60)),
    ],
    "by heart, then fresh rows": [*[0.001] * 50, *[0.9] * 50],
    "an epoch's rows that are harder": [*[1.1] * 50, *[2.9] * 50],
    "too short to have a level": [1.0] * 5 + [50.0] * 14,
}


@pytest.mark.parametrize("losses", QUIET.values(), ids=QUIET)
def test_what_is_no_explosion_is_let_be(losses: list[float]):
    assert fires_at(losses) is None


def test_noisy_runs_never_trip_it():
    # Ninety-five in a hundred steps within a factor of 2.7 of the curve: far noisier than small batches of mixed rows.
    for seed in range(300):
        first, last = random.Random(seed).choice([(11, 2.5), (3, 1.2), (2, 0.3), (1.5, 0.02), (4, 3.5)])
        assert fires_at(curve(seed, 1500, first=first, last=last, noise=0.5)) is None, seed


def test_one_step_out_of_bounds_is_known_at_once():
    trend = Trend()
    for _ in range(WINDOW_STEPS):
        trend.see(2.0)
    assert not trend.out_of_bounds(RATIO)
    trend.see(6.1)
    assert trend.out_of_bounds(RATIO) and not trend.exploded(RATIO) and not trend.out_of_bounds(0)
