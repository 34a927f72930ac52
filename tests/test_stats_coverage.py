"""Every interval over 10,000 simulated evaluations: what is promised holds, and peeking at fixed-size bounds breaks it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import betaincinv

from benchmarks.simulated import ALPHA, RUNS, TOTAL, N, decks, paths, sizes
from mohs.records import clopper_pearson, finite_bounds, finite_sequence, mcnemar, median_interval
from mohs.records.anytime import evidence, evidence_above, log_capital

LIMIT = math.log(1 / ALPHA)
# three standard errors of a share of 0.05 among 10,000
SLACK = 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
TAUS = (0.05, 0.5, 0.6, 0.9, 0.99)


TABLE_K, TABLE_N = np.meshgrid(np.arange(N + 1), np.arange(1, N + 1))
POSSIBLE = TABLE_K <= TABLE_N


def along(table: NDArray[np.bool_], p: float) -> NDArray[np.bool_]:
    """What a table by (n - 1, k) says after each example of each run."""
    return table[np.arange(N), paths(p)]


def table(of: Callable[..., NDArray[Any]]) -> NDArray[np.float64]:
    found = np.zeros((N, N + 1))
    found[POSSIBLE] = of(TABLE_K[POSSIBLE], TABLE_N[POSSIBLE])
    return found


@pytest.mark.parametrize("p", TAUS)
class TestOptionalStopping:
    def test_the_sequence_misses_the_truth_at_any_time_at_most_that_often(self, p: float) -> None:
        ever = along(table(lambda k, n: evidence(k, n, p)) >= LIMIT, p).any(1)
        assert ever.mean() <= ALPHA + SLACK

    def test_a_true_claim_is_refuted_at_most_that_often(self, p: float) -> None:
        # stop at the first n at which the upper bound is below the claimed share, which is the truth
        ever = along(table(lambda k, n: evidence_above(n - k, n, 1 - p)) >= LIMIT, p).any(1)
        assert ever.mean() <= ALPHA + SLACK

    def test_a_false_claim_is_upheld_at_most_that_often(self, p: float) -> None:
        # the truth is the claimed share less next to nothing
        ever = along(table(lambda k, n: evidence_above(k, n, p)) >= LIMIT, p).any(1)
        assert ever.mean() <= ALPHA + SLACK

    def test_the_further_from_the_claim_the_rarer(self, p: float) -> None:
        # claimed a little less than is true; the error that remains must be no larger
        claimed = 0.95 * p
        ever = along(table(lambda k, n: evidence_above(n - k, n, 1 - claimed)) >= LIMIT, p).any(1)
        assert ever.mean() <= ALPHA

    def test_peeking_at_clopper_pearson_breaks_the_promise(self, p: float) -> None:
        upper = table(lambda k, n: betaincinv(k + 1, np.maximum(n - k, 1e-9), 1 - ALPHA))
        upper[TABLE_K == TABLE_N] = 1.0
        assert upper[9, 3] == pytest.approx(clopper_pearson(3, 10, ALPHA, sides=1)[1])
        refuted = along(upper < p, p)
        assert refuted[:, -1].mean() <= ALPHA + SLACK  # at a size fixed beforehand it holds
        peeked = refuted[:, 9:].any(1).mean()
        assert peeked > 2 * ALPHA  # at whichever n from 10 on one likes it does not


@pytest.mark.parametrize("p", TAUS)
def test_clopper_pearson_at_a_fixed_size(p: float) -> None:
    last = paths(p)[:, -1]
    seen = np.unique(last)
    bounds = np.array([clopper_pearson(int(k), N) for k in seen])
    missed = (bounds[:, 0] > p) | (bounds[:, 1] < p)
    assert missed[np.searchsorted(seen, last)].mean() <= ALPHA + SLACK
    one = np.array([clopper_pearson(int(k), N, sides=1) for k in seen])
    for wrong in (one[:, 0] > p, one[:, 1] < p):
        assert wrong[np.searchsorted(seen, last)].mean() <= ALPHA + SLACK


@pytest.mark.parametrize("many", [4, 60, 100, 119])
class TestFiniteSets:
    def test_at_a_fixed_size(self, many: int) -> None:
        k = np.random.default_rng(many).hypergeometric(many, TOTAL - many, 50, RUNS)
        bounds = np.array([finite_bounds(k, 50, TOTAL, sides=1) for k in range(51) if k <= many])
        assert (bounds[k, 0] > many).mean() <= ALPHA + SLACK
        assert (bounds[k, 1] < many).mean() <= ALPHA + SLACK

    def test_at_any_time(self, many: int) -> None:
        k = decks(many)
        times = np.arange(5, TOTAL + 1, 5)
        low, high = np.zeros(RUNS, bool), np.zeros(RUNS, bool)
        for n in times.tolist():
            seen, where = np.unique(k[:, n - 1], return_inverse=True)
            bounds = np.array([finite_sequence(int(s), n, TOTAL) for s in seen])
            low |= (bounds[:, 0] > many)[where]
            high |= (bounds[:, 1] < many)[where]
        assert low.mean() <= ALPHA + SLACK
        assert high.mean() <= ALPHA + SLACK


SHAPE = (RUNS, N // 2)


@pytest.mark.parametrize("kind", ["shares of five draws", "u-shaped", "coins"])
def test_mean_by_betting_at_any_time(kind: str) -> None:
    rng = np.random.default_rng(7)
    x, truth = {
        "shares of five draws": lambda: (rng.binomial(5, 0.7, SHAPE) / 5, 0.7),
        "u-shaped": lambda: (rng.beta(0.2, 0.1, SHAPE), 2 / 3),
        "coins": lambda: ((rng.random(SHAPE) < 0.95).astype(float), 0.95),
    }[kind]()
    for side, mean in ((x, truth), (1 - x, 1 - truth)):
        assert (log_capital(side, mean, ALPHA) >= LIMIT).any(1).mean() <= ALPHA + SLACK
    assert (log_capital(x, 0.7 * truth, ALPHA) >= LIMIT).any(1).mean() > 0.9  # and it has power


@pytest.mark.parametrize("broken", [0.2, 0.5, 0.8])
def test_median_with_failures_at_infinity(broken: float) -> None:
    found, truth = sizes(broken)
    bounds = np.array([median_interval(row) for row in found])
    if broken == 0.5:  # any number above all finite sizes is a median, and so is infinity
        assert (bounds[:, 1] == math.inf).mean() >= 1 - ALPHA - SLACK
        return
    missed = (bounds[:, 0] > truth) | (bounds[:, 1] < truth)
    assert missed.mean() <= ALPHA + SLACK


def test_mcnemar_of_equal_models() -> None:
    rng = np.random.default_rng(0)
    differ = rng.binomial(200, 0.2, RUNS)
    first = rng.binomial(differ, 0.5)
    p = np.array([mcnemar(b, c) for b, c in zip(first.tolist(), (differ - first).tolist())])
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level + SLACK
    assert (p <= 0.2).mean() > 0.08
