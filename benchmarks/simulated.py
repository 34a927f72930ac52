"""Simulated evaluations whose truth is known, for the benchmark and for the tests of the bounds."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

RUNS, N, ALPHA = 10_000, 300, 0.05
"""How many evaluations, of how many examples at most; how often a bound may be wrong."""
TOTAL = 120
"""Examples of a finite test set."""
SIZES = 41
"""Sizes of smallest changes in one evaluation."""


@cache
def paths(p: float) -> NDArray[np.int64]:
    """Survivors after 1 to N examples of each evaluation, [RUNS, N], where each survives with probability p."""
    return (np.random.default_rng(round(1000 * p)).random((RUNS, N)) < p).cumsum(1)


def decks(many: int) -> NDArray[np.int64]:
    """Survivors after 1 to TOTAL examples of a finite set in random order, [RUNS, TOTAL], of which ``many`` survive."""
    deck = np.tile((np.arange(TOTAL) < many).astype(np.int64), (RUNS, 1))
    return np.random.default_rng(many).permuted(deck, axis=1).cumsum(1)


def sizes(broken: float) -> tuple[NDArray[np.float64], float]:
    """Sizes of changes, [RUNS, SIZES], infinite for those not broken: P(size <= t) = broken (1 - exp(-t)); and their median."""
    rng = np.random.default_rng(round(10 * broken))
    found = np.where(rng.random((RUNS, SIZES)) < broken, rng.exponential(1.0, (RUNS, SIZES)), np.inf)
    return found, -math.log(1 - 0.5 / broken) if broken > 0.5 else math.inf
