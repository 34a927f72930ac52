"""Evaluations that end as soon as the claim is decided, 10,000 of them simulated: how often they are wrong, and how soon they end."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from mohs.errors import ClaimError
from mohs.evaluation import Accuracy, Counts, decided, judge
from mohs.records import finite_sequence
from mohs.records.anytime import evidence_above

RUNS, N, ALPHA = 10_000, 300, 0.05
SLACK = 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)


def limits(tau: float, alpha: float = ALPHA) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For n = 1 to N: refuted up to which number of survivors (-1: never), and upheld from which on (n + 1: never)."""
    n = np.arange(1, N + 1)[:, None]
    k = np.arange(N + 1)[None]
    inside = k <= n
    left = np.where(inside, n - k, 0)
    refuted = inside & (evidence_above(left, n, 1 - tau) >= math.log(1 / alpha))
    upheld = inside & (evidence_above(np.minimum(k, n), n, tau) >= math.log(1 / alpha))
    return refuted.sum(1) - 1, n[:, 0] + 1 - upheld.sum(1)


def ended(truth: float, tau: float, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each evaluation: the verdict (-1 refuted, 0 undecided, 1 upheld), and after how many examples."""
    low, high = limits(tau)
    k = (np.random.default_rng(seed).random((RUNS, N)) < truth).cumsum(1)
    word = np.where(k <= low, -1, np.where(k >= high, 1, 0))
    stop = np.where((word != 0).any(1), (word != 0).argmax(1), N - 1)
    return word[np.arange(RUNS), stop], stop + 1


@pytest.mark.parametrize("tau", [0.3, 0.6, 0.9])
class TestErrorRates:
    def test_the_simulation_decides_as_the_library_does(self, tau: float) -> None:
        low, high = limits(tau)
        for n in (1, 2, 5, 17, 60, 150, 299, 300):
            below, above = int(low[n - 1]), int(high[n - 1])
            for k in {max(below, 0), below + 1, above - 1, min(above, n)}:
                if not 0 <= k <= n:
                    continue
                expected = k <= below or k >= above
                assert decided(Accuracy(tau), n, k) == expected, (n, k)
                word = judge(Accuracy(tau), Counts(threat="t", n=n, survived=k, stopped=True)).word
                assert word == ("refuted" if k <= below else "upheld so far" if k >= above else "undecided")

    @pytest.mark.parametrize("above", [0.0, 0.02, 0.05])
    def test_a_true_claim_is_seldom_refuted(self, tau: float, above: float) -> None:
        word, _ = ended(tau + above, tau)
        assert (word == -1).mean() <= ALPHA + SLACK * (above == 0)

    @pytest.mark.parametrize("below", [0.0, 0.02, 0.05])
    def test_a_false_claim_is_seldom_upheld(self, tau: float, below: float) -> None:
        # the lower bound of the certified is the same one, so this is also how often a false claim is certified
        word, _ = ended(tau - below, tau)
        assert (word == 1).mean() <= ALPHA + SLACK * (below == 0)

    def test_what_is_clear_is_decided_early(self, tau: float) -> None:
        for truth in (tau - 0.25, min(tau + 0.25, 0.999)):
            word, n = ended(truth, tau)
            expected = -1 if truth < tau else 1
            if truth < tau or tau < 0.9:
                assert (word == expected).mean() > 0.9
                assert np.median(n) < N / 3


@pytest.mark.parametrize("tau", [0.5, 0.7])
def test_one_test_set_in_random_order(tau: float) -> None:
    total = 100
    needed = round(tau * total)
    steps = list(range(4, total + 1, 4))
    table = {n: np.array([finite_sequence(k, n, total) for k in range(n + 1)]) for n in steps}
    for many in (needed, needed - 1):  # just true, just false
        deck = np.tile((np.arange(total) < many).astype(np.int64), (RUNS, 1))
        k = np.random.default_rng(many).permuted(deck, axis=1).cumsum(1)
        refuted, upheld = np.zeros(RUNS, bool), np.zeros(RUNS, bool)
        for n in steps:
            low, high = table[n][k[:, n - 1]].T
            going = ~refuted & ~upheld
            refuted |= going & (high < needed)
            upheld |= going & (low >= needed)
        assert (refuted | upheld).all()  # at the end at the latest
        assert (refuted if many == needed else upheld).mean() <= ALPHA + SLACK
    for n in (4, 20, 48, 80, 100):
        for k in range(n + 1):
            low, high = table[n][k]
            assert decided(Accuracy(tau, here=True), n, k, total) == (high < needed or low >= needed), (n, k)


class TestDecided:
    def test_more_of_the_same_keeps_it_decided(self) -> None:
        assert decided("accuracy >= 0.6", 20, 2)
        assert all(decided("accuracy >= 0.6", n, 2) for n in range(20, 60))
        assert not decided("accuracy >= 0.6", 0, 0)

    def test_certificates_may_decide(self) -> None:
        assert not decided("certified >= 0.5", 60, 60, certified=30)
        assert decided("certified >= 0.5", 60, 60, certified=50)
        assert decided("certified >= 0.5", 60, 60, certified=10)

    def test_alpha(self) -> None:
        assert decided("accuracy >= 0.6", 20, 6, alpha=0.2)
        assert not decided("accuracy >= 0.6", 20, 6, alpha=0.001)

    def test_whoever_may_stop_at_any_time_needs_more(self) -> None:
        # 172 of 200 refute 90% at a size fixed beforehand; who may stop at any time needs more
        assert judge("accuracy >= 90%", Counts(threat="t", n=200, survived=172)).word == "refuted"
        assert decided("accuracy >= 90%", 200, 164)
        assert not decided("accuracy >= 90%", 200, 165)

    def test_refusals(self) -> None:
        for text in ("median >= 0.3", "detection >= 0.9 at fpr 0.05"):
            with pytest.raises(ClaimError, match="claim on a share"):
                decided(text, 10, 5)
        with pytest.raises(ClaimError, match="size as total"):
            decided("accuracy >= 0.6 on these examples", 10, 5)
