"""Areas under curves against the definition, and the coverage of their intervals."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mohs.errors import DataError, UsageError
from mohs.evaluation import ROC

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_the_area_is_what_it_is_defined_as(clean: list[float], attacked: list[float]) -> None:
    roc = ROC(clean, attacked)
    pairs = [(a > c) + 0.5 * (a == c) for a in attacked for c in clean]
    assert roc.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    false, true = roc.curve()
    area = float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())
    assert area == pytest.approx(roc.auc, abs=1e-12), "straight lines between ties"
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert ROC(attacked, clean).auc == pytest.approx(1 - roc.auc, abs=1e-12)
    low, high = roc.interval()
    assert 0 <= low <= roc.auc <= high <= 1


@pytest.mark.parametrize("apart", [0.0, 1.0, 2.0])
def test_the_intervals_cover(apart: float) -> None:
    """Scores N(0, 1) and N(apart, 1): the area is Phi(apart / sqrt 2)."""
    truth, rng, hits, tries = NormalDist().cdf(apart / math.sqrt(2)), np.random.default_rng(int(apart)), 0, 400
    for _ in range(tries):
        low, high = ROC(rng.normal(size=80), rng.normal(apart, size=60)).interval(0.1)
        hits += low <= truth <= high
    assert 0.86 < hits / tries < 0.95


def test_a_rate_holds_for_further_clean_inputs() -> None:
    rng, flagged, tries = np.random.default_rng(4), [], 400
    for _ in range(tries):
        flagged.append(ROC(rng.normal(size=60), rng.normal(size=1)).rate(0.1)[0])  # 'attacked' is one more clean score
    assert 0.06 < np.mean(flagged) < 0.13


def test_rates_by_hand() -> None:
    roc = ROC(np.arange(19.0), [17.5, 18.0, 19.0, 20.0])
    assert roc.rate(0.05)[0] == 0.5, "above 18, the largest of 19"
    assert roc.rate(0.1)[0] == 1.0, "above 17"
    assert roc.rate(0.05)[1:] == pytest.approx((0.0676, 0.9324), abs=1e-4)


def test_what_cannot_be_resolved_is_refused() -> None:
    with pytest.raises(DataError, match="takes at least 99 clean scores; got 19"):
        ROC(np.arange(19.0), [1.0]).rate(0.01)
    with pytest.raises(DataError, match="scores of clean inputs"):
        ROC([], [1.0])
    with pytest.raises(DataError, match="1 of 2 are nan"):
        ROC([0.0], [math.nan, 1.0])
    for bad in (0.0, 1.0, -1.0):
        with pytest.raises(UsageError, match="fpr must lie"):
            ROC([0.0], [1.0]).rate(bad)
        with pytest.raises(UsageError, match="alpha must lie"):
            ROC([0.0], [1.0]).interval(bad)
