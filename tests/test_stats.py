"""Bounds against closed forms, exact whole-number arithmetic, and scipy's own distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from mohs.errors import UsageError
from mohs.records import (
    clopper_pearson,
    confidence_sequence,
    finite_bounds,
    finite_sequence,
    mcnemar,
    mcnemar_of,
    mean_bounds,
    median_interval,
)
from mohs.records.anytime import evidence, evidence_above, log_capital


def counts(n: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(1, n).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


class TestConfidenceSequence:
    @pytest.mark.parametrize("n", [1, 7, 1000, 10**6])
    def test_closed_form_where_nothing_succeeds(self, n: int) -> None:
        # 1 / ((n + 1) (1 - p)^n) = 1 / alpha
        low, high = confidence_sequence(0, n, 0.05)
        expected = -math.expm1(math.log(0.05 / (n + 1)) / n)
        assert low == 0
        assert high == pytest.approx(expected, rel=1e-9)
        assert confidence_sequence(n, n, 0.05) == pytest.approx((1 - expected, 1.0), rel=1e-9)

    @pytest.mark.parametrize("n", [1, 5, 60])
    def test_closed_form_one_sided_where_all_succeed(self, n: int) -> None:
        # mean over q in (p, 1) of (q / p)^n, from the antiderivative
        for p in (0.1, 0.5, 0.93):
            mean = Fraction(1) - Fraction(p) ** (n + 1)
            mean /= (n + 1) * (1 - Fraction(p)) * Fraction(p) ** n
            assert evidence_above(n, n, p) == pytest.approx(math.log(mean), rel=1e-10, abs=1e-12)
        assert confidence_sequence(n, n, sides=1)[1] == 1

    @pytest.mark.parametrize(("k", "n", "p"), [(12, 20, 0.4), (3, 20, 0.1), (19, 20, 0.7), (0, 4, 0.2), (90, 200, 0.5)])
    def test_evidence_is_the_mean_likelihood_ratio(self, k: int, n: int, p: float) -> None:
        def ratio(q: float) -> float:
            return float((q / p) ** k * ((1 - q) / (1 - p)) ** (n - k))

        weighted = integrate.quad(lambda q: ratio(q) * stats.beta.pdf(q, 2, 3), 0, 1, epsabs=0)[0]
        assert evidence(k, n, p, a=2, b=3) == pytest.approx(math.log(weighted), rel=1e-7)
        above = integrate.quad(ratio, p, 1, epsabs=0)[0] / (1 - p)
        assert evidence_above(k, n, p) == pytest.approx(math.log(above), rel=1e-7)

    @pytest.mark.parametrize("n", [3, 12])
    def test_expected_evidence_is_at_most_one(self, n: int) -> None:
        k = np.arange(n + 1)
        for p in (0.1, 0.5, 0.8):
            mean = (stats.binom.pmf(k, n, p) * np.exp(evidence(k, n, p, a=0.5, b=2))).sum()
            assert mean == pytest.approx(1)
            assert (stats.binom.pmf(k, n, p) * np.exp(evidence_above(k, n, p))).sum() == pytest.approx(1)
            less = (stats.binom.pmf(k, n, 0.9 * p) * np.exp(evidence_above(k, n, p))).sum()
            assert less < 1

    @settings(deadline=None, max_examples=60)
    @given(counts(10**6), st.sampled_from([0.001, 0.05, 0.3]), st.sampled_from([1, 2]))
    def test_bounds_lie_around_the_share_and_mirror(self, kn: tuple[int, int], alpha: float, sides: int) -> None:
        k, n = kn
        low, high = confidence_sequence(k, n, alpha, sides)
        assert 0 <= low <= k / n <= high <= 1
        assert (1 - high, 1 - low) == pytest.approx(confidence_sequence(n - k, n, alpha, sides), abs=1e-12)
        narrow = clopper_pearson(k, n, alpha, sides)
        assert low <= narrow[0] + 1e-12
        assert narrow[1] <= high + 1e-12

    @pytest.mark.parametrize("sides", [1, 2])
    def test_the_bounds_are_where_the_evidence_crosses(self, sides: int) -> None:
        against = evidence_above if sides == 1 else evidence
        for k, n in ((1, 10**6), (999_999, 10**6), (500_000, 10**6), (30, 100), (1, 1)):
            low, _ = confidence_sequence(k, n, 0.05, sides)
            assert against(k, n, low * (1 - 1e-6)) > math.log(20) - 1e-5
            assert against(k, n, low * (1 + 1e-6)) < math.log(20) + 1e-5

    def test_one_sided_evidence_falls_with_p(self) -> None:
        for k, n in ((1, 10), (5, 10), (10, 10), (400, 1000)):
            values = evidence_above(k, n, np.linspace(0.001, 0.999, 500))
            assert (np.diff(values[np.isfinite(values)]) < 0).all()

    def test_one_side_is_closer_than_two(self) -> None:
        one, two = confidence_sequence(600, 1000, sides=1), confidence_sequence(600, 1000)
        assert two[0] < one[0] < 0.6 < one[1] < two[1]

    def test_the_prior_moves_where_it_is_narrow(self) -> None:
        def width(k: int, **prior: float) -> float:
            low, high = confidence_sequence(k, 100, **prior)
            return high - low

        assert width(95, a=19, b=1) < width(95)
        assert width(50, a=19, b=1) > width(50)

    def test_nothing_seen_bounds_nothing(self) -> None:
        assert confidence_sequence(0, 0) == (0, 1)

    def test_refusals(self) -> None:
        for arguments in ((3, 2), (-1, 2), (1.5, 2)):
            with pytest.raises(UsageError, match="counts"):
                confidence_sequence(*arguments)
        with pytest.raises(UsageError, match="alpha"):
            confidence_sequence(1, 2, 1.0)
        with pytest.raises(UsageError, match="sides"):
            confidence_sequence(1, 2, sides=3)
        with pytest.raises(UsageError, match="a and b"):
            confidence_sequence(1, 2, a=0.0)
        with pytest.raises(UsageError, match="a and b"):
            confidence_sequence(1, 2, sides=1, a=2.0)


class TestFinite:
    @pytest.mark.parametrize(("n", "total"), [(1, 1), (5, 9), (10, 30), (30, 30)])
    @pytest.mark.parametrize("alpha", [0.05, 0.3])
    def test_against_exact_tails(self, n: int, total: int, alpha: float) -> None:
        def tail(k: int, many: int) -> Fraction:  # P(k or fewer of n | many of total)
            ways = sum(math.comb(many, i) * math.comb(total - many, n - i) for i in range(k + 1))
            return Fraction(ways, math.comb(total, n))

        for k in range(n + 1):
            low, high = finite_bounds(k, n, total, alpha, sides=1)
            kept = [m for m in range(k, total - n + k + 1) if tail(k, m) > Fraction(alpha)]
            assert high == max(kept)
            assert low == total - finite_bounds(n - k, n, total, alpha, sides=1)[1]
            two = finite_bounds(k, n, total, alpha)
            assert two == (
                finite_bounds(k, n, total, alpha / 2, sides=1)[0],
                finite_bounds(k, n, total, alpha / 2, sides=1)[1],
            )

    def test_against_scipy_where_it_is_large(self) -> None:
        low, high = finite_bounds(2900, 5000, 100_000, 0.05, sides=1)
        assert (
            stats.hypergeom.cdf(2900, 100_000, high, 5000) > 0.05 >= stats.hypergeom.cdf(2900, 100_000, high + 1, 5000)
        )
        assert stats.hypergeom.sf(2899, 100_000, low, 5000) > 0.05 >= stats.hypergeom.sf(2899, 100_000, low - 1, 5000)

    @pytest.mark.parametrize("bounds", [finite_bounds, finite_sequence])
    def test_without_doubt_at_the_end_and_never_beyond_the_possible(
        self, bounds: Callable[[int, int, int], tuple[int, int]]
    ) -> None:
        for k in range(13):
            assert bounds(k, 12, 12) == (k, k)
            low, high = bounds(k, 12, 20)
            assert k <= low <= high <= k + 8

    def test_a_part_of_a_small_set_says_more_than_a_sample_of_many(self) -> None:
        low, high = finite_bounds(300, 500, 600, sides=1)
        wide = clopper_pearson(300, 500, sides=1)
        assert wide[0] < low / 600 < 0.6 < high / 600 < wide[1]

    def test_of_very_many_it_is_binomial(self) -> None:
        low, high = finite_bounds(30, 50, 10**6, sides=1)
        assert (low / 10**6, high / 10**6) == pytest.approx(clopper_pearson(30, 50, sides=1), abs=1e-4)

    @pytest.mark.parametrize(("k", "n", "total"), [(3, 7, 12), (0, 7, 12), (7, 7, 12), (20, 31, 50)])
    def test_sequence_against_whole_numbers(self, k: int, n: int, total: int) -> None:
        def ways(many: int) -> int:
            return math.comb(many, k) * math.comb(total - many, n - k)

        possible = range(k, total - n + k + 1)
        kept = [m for m in possible if m == 0 or Fraction(sum(map(ways, range(m))), m) < 20 * ways(m)]
        assert finite_sequence(k, n, total)[1] == max(kept)

    @pytest.mark.parametrize("many", [2, 9, 15])
    def test_expected_evidence_against_the_truth_and_beyond_is_at_most_one(self, many: int) -> None:
        # what the sequence rests on, in whole numbers: under `truth` >= many, the mean ratio has expectation <= 1
        n, total = 7, 16

        def chance(k: int, m: int) -> Fraction:
            return Fraction(math.comb(m, k) * math.comb(total - m, n - k), math.comb(total, n))

        for truth in range(many, total + 1):
            mean = Fraction(0)
            for k in range(n + 1):
                if chance(k, many):
                    smaller = sum((chance(k, m) for m in range(many)), Fraction(0)) / many
                    mean += chance(k, truth) * smaller / chance(k, many)
            assert mean <= 1

    def test_refusals(self) -> None:
        for bounds in (finite_bounds, finite_sequence):
            with pytest.raises(UsageError, match="total=9"):
                bounds(3, 10, 9)
            with pytest.raises(UsageError, match="alpha"):
                bounds(3, 10, 20, 0.0)
        with pytest.raises(UsageError, match="sides"):
            finite_bounds(3, 10, 20, sides=0)


class TestMean:
    def test_the_capital_step_by_step(self) -> None:
        x, m, alpha = np.random.default_rng(0).random(30), 0.4, 0.05
        wealth, seen, squares, variance = 1.0, 0.5, 0.25, 0.25
        for t, value in enumerate(x.tolist(), 1):
            stake = min(math.sqrt(2 * math.log(1 / alpha) / (variance * t * math.log(t + 1))), 0.75 / m)
            wealth *= 1 + stake * (value - m)
            seen += value
            squares += (value - seen / (t + 1)) ** 2
            variance = squares / (t + 1)
        assert log_capital(x, m, alpha)[-1] == pytest.approx(math.log(wealth))

    def test_the_capital_falls_with_the_mean_bet_against(self) -> None:
        x = np.random.default_rng(1).random(100)
        capital = np.array([log_capital(x, m, 0.05)[-1] for m in np.linspace(0, 1, 200)])
        assert (np.diff(capital) < 0).all()

    def test_no_value_tells_before_it_is_seen(self) -> None:
        x = np.random.default_rng(2).random(50)
        other = np.concatenate([x[:20], 1 - x[20:]])
        assert (log_capital(x, 0.5, 0.05)[:20] == log_capital(other, 0.5, 0.05)[:20]).all()
        # nor the stake at the value itself: the factor is linear in it
        first = [math.exp(log_capital(np.append(x[:20], v), 0.5, 0.05)[-1]) for v in (0.0, 0.5, 1.0)]
        assert first[1] == pytest.approx((first[0] + first[2]) / 2)

    def test_scores_that_vary_little_get_narrow_bounds(self) -> None:
        rng = np.random.default_rng(3)
        still, coins = 0.7 + 0.02 * rng.standard_normal(400).clip(-3, 3), (rng.random(400) < 0.7).astype(float)
        (a, b), (c, d) = mean_bounds(still), mean_bounds(coins)
        assert b - a < 0.3 * (d - c)
        assert a < 0.7 < b
        assert c < 0.7 < d

    @pytest.mark.parametrize("values", [[0.0] * 50, [1.0] * 50, [0.0, 1.0] * 30, [0.3], [1.0], []])
    def test_extremes(self, values: list[float]) -> None:
        low, high = mean_bounds(values)
        assert 0 <= low <= (np.mean(values) if values else 0.5) <= high <= 1
        mirrored = mean_bounds([1 - v for v in values])
        assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-9)

    def test_refusals(self) -> None:
        for values in ([0.5, 1.5], [-0.1], [math.nan], [[0.5]]):
            with pytest.raises(UsageError, match=r"\[0, 1\]"):
                mean_bounds(values)
        with pytest.raises(UsageError, match="sides"):
            mean_bounds([0.5], sides=3)


class TestMedian:
    @pytest.mark.parametrize("alpha", [0.05, 0.01, 0.4])
    def test_ranks_against_whole_numbers(self, alpha: float) -> None:
        for n in range(60):
            values = np.arange(1, n + 1)
            for sides in (1, 2):
                fits = [
                    rank for rank in range(1, n + 1)
                    if Fraction(sum(math.comb(n, i) for i in range(rank)), 2**n) <= Fraction(alpha) / sides
                ]  # fmt: skip
                expected = (max(fits), n + 1 - max(fits)) if fits else (-math.inf, math.inf)
                assert median_interval(values, alpha, sides) == expected

    def test_known_rank(self) -> None:
        # Thompson's table: of 25 values, the 8th and the 18th bound the median at 95%
        assert median_interval(range(1, 26)) == (8, 18)

    def test_failures_at_infinity(self) -> None:
        sizes = [0.1] * 30 + [math.inf] * 70
        assert median_interval(sizes) == (math.inf, math.inf)
        assert median_interval([0.1] * 50 + [math.inf] * 50) == (0.1, math.inf)
        assert median_interval(np.random.default_rng(0).permutation([0.1] * 70 + [math.inf] * 30)) == (0.1, 0.1)

    def test_refusals(self) -> None:
        for values in ([math.nan, 1.0], [[1.0]]):
            with pytest.raises(UsageError, match="list of numbers"):
                median_interval(values)
        with pytest.raises(UsageError, match="alpha"):
            median_interval([1.0], 2.0)


class TestMcNemar:
    @given(st.integers(0, 300), st.integers(0, 300))
    def test_against_scipy(self, b: int, c: int) -> None:
        expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)

    def test_of_two_lists(self) -> None:
        first, second = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
        assert mcnemar_of(first, second) == (2, 1, mcnemar(2, 1))
        with pytest.raises(UsageError, match="same examples"):
            mcnemar_of([True], [True, False])
