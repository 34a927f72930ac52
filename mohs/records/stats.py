"""Exact statistics of counts at a size that was fixed beforehand: shares, finite test sets, medians, two records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mohs.errors import UsageError


def clopper_pearson(k: int, n: int, alpha: float = 0.05, sides: int = 2) -> tuple[float, float]:
    """Exact confidence bounds on a probability after k successes in n independent trials.

    The two-sided interval misses the truth with probability at most alpha, whatever the truth is. With
    ``sides=1`` each bound on its own does, and they must not be used together.

    Args:
        k: successes.
        n: trials.
        alpha: one minus the confidence.
        sides: 2 for an interval, 1 for two separate one-sided bounds.

    Returns:
        Lower and upper bound; (0, 1) when there were no trials.

    Raises:
        UsageError: not 0 <= k <= n, alpha outside (0, 1), or sides other than 1 and 2.

    >>> [round(100 * bound, 2) for bound in clopper_pearson(900, 1000)]
    [87.97, 91.79]

    **Differs from the paper**: nothing; the bounds are written as quantiles of beta distributions.

    **Source**: Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the
    binomial, Biometrika 26 (1934).
    """
    k, n = checked_counts(k, n)
    tail = _tail(alpha, sides)
    from scipy.special import betaincinv

    lower = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    upper = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return lower, upper


def lower_bound(k: int, n: int, alpha: float = 0.05) -> float:
    """One-sided lower bound: the truth lies below it with probability at most alpha."""
    return clopper_pearson(k, n, alpha, sides=1)[0]


def upper_bound(k: int, n: int, alpha: float = 0.05) -> float:
    """One-sided upper bound: the truth lies above it with probability at most alpha.

    >>> upper_bound(883, 1000) < 0.9 < upper_bound(884, 1000)
    True
    """
    return clopper_pearson(k, n, alpha, sides=1)[1]


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test for two models on the same examples.

    Only examples on which the two differ count; if the models are equally good, each such example favours
    either with probability one half.

    Args:
        b: examples only the first gets right.
        c: examples only the second gets right.

    Returns:
        The p-value: twice the smaller binomial tail, at most 1; 1 when they never differ.

    Raises:
        UsageError: a negative count.

    >>> mcnemar(0, 6)
    0.03125
    """
    k, n = checked_counts(min(b, c), b + c)
    term, tail = 1, 1
    for i in range(k):  # whole numbers throughout: exact for any counts
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def finite_bounds(k: int, n: int, total: int, alpha: float = 0.05, sides: int = 2) -> tuple[int, int]:
    """Exact bounds on the successes among ``total`` things, of which n were drawn at random without replacement.

    For a claim about one test set of which a part was evaluated. Where all of it was, both are k: no statistics is left. As
    soon as n - k failures leave fewer than were claimed, the upper bound says so whatever alpha is.

    Args:
        k: successes among the drawn.
        n: drawn, their number fixed beforehand (else: ``finite_sequence``).
        total: how many things there are.
        alpha: one minus the confidence.
        sides: 2 for an interval, 1 for two separate one-sided bounds.

    Returns:
        Lower and upper bound on the number of successes among all.

    Raises:
        UsageError: not 0 <= k <= n <= total, alpha outside (0, 1), or sides other than 1 and 2.

    Cost: sums of at most n terms, about log2(total) of them for each bound.

    >>> finite_bounds(40, 100, 1000), finite_bounds(40, 100, 100), finite_bounds(0, 51, 100)[1]
    ((308, 497), (40, 40), 5)

    **Differs from the paper**: nothing.

    **Source**: Buonaccorsi, A note on confidence intervals for proportions in finite populations, The American Statistician
    41 (1987): all numbers under which neither tail of the hypergeometric distribution is below alpha.
    """
    k, n = checked_counts(k, n)
    n, total = checked_counts(n, total, "n", "total")
    tail = _tail(alpha, sides)
    return total - _finite_upper(n - k, n, total, tail), _finite_upper(k, n, total, tail)


def _finite_upper(k: int, n: int, total: int, alpha: float) -> int:
    """The largest number of successes in all under which k or fewer among n are not too rare."""
    from scipy.special import gammaln

    def choose(of: int | np.ndarray, some: int | np.ndarray) -> np.ndarray:
        found: np.ndarray = gammaln(np.add(of, 1)) - gammaln(np.add(some, 1)) - gammaln(np.subtract(of, some) + 1)
        return found

    def rare(many: int) -> bool:
        i = np.arange(max(0, n - (total - many)), k + 1)
        tail = np.exp(choose(many, i) + choose(total - many, n - i) - choose(total, n)).sum()
        return bool(tail <= alpha * (1 - 1e-7))  # rounding must not exclude

    return _first(rare, k, total - (n - k) + 1) - 1


def median_interval(values: ArrayLike, alpha: float = 0.05, sides: int = 2) -> tuple[float, float]:
    """Exact bounds on the median of what the values were drawn from, whatever its distribution: two of the values.

    For sizes of changes: where no attack found any, the value is infinite and counts as such, which a mean could not bear.

    Args:
        values: [N], drawn independently; infinities and ties are allowed.
        alpha: one minus the confidence.
        sides: 2 for an interval, 1 for two separate one-sided bounds.

    Returns:
        Lower and upper bound: the l-th smallest and l-th largest value, where l is the largest number such that fewer than l
        of N tosses of a fair coin come up heads with probability at most alpha (or half of it, two-sided). With too few
        values for any, -inf and inf.

    Raises:
        UsageError: values that are no list of numbers, alpha outside (0, 1), or sides other than 1 and 2.

    >>> median_interval([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, float("inf"), float("inf")])
    (0.1, inf)

    **Differs from the paper**: nothing.

    **Source**: Thompson, On confidence ranges for the median and other expectation distributions for populations of unknown
    distribution form, Annals of Mathematical Statistics 7 (1936).
    """
    x = np.sort(np.asarray(values, float))
    if x.ndim != 1 or np.isnan(x).any():
        raise UsageError(f"values must be a list of numbers, nan not among them; got {np.shape(values)}.")
    rank = _median_rank(len(x), _tail(alpha, sides))
    return (-math.inf, math.inf) if rank == 0 else (float(x[rank - 1]), float(x[-rank]))


def _median_rank(n: int, alpha: float) -> int:
    """The largest l such that fewer than l of n tosses of a fair coin come up heads with probability at most alpha."""
    from scipy.special import betainc

    def common(rank: int) -> bool:
        return bool(betainc(n - rank + 1, rank, 0.5) > alpha)

    return _first(common, 1, n + 1) - 1


def mcnemar_of(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> tuple[int, int, float]:
    """McNemar's test for two models on the same examples, from what each got right.

    Returns:
        How many only the first got right, how many only the second, and the exact two-sided p-value.

    Raises:
        UsageError: lists of unequal length.

    >>> mcnemar_of([True] * 8 + [False] * 2, [True, True] + [False] * 8)
    (6, 0, 0.03125)
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.ndim != 1:
        raise UsageError(f"two lists about the same examples are needed; got shapes {a.shape} and {b.shape}.")
    left, right = int((a & ~b).sum()), int((b & ~a).sum())
    return left, right, mcnemar(left, right)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first number from low on for which something holds that goes on to hold from there; high if none below."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _tail(alpha: float, sides: int) -> float:
    checked_alpha(alpha)
    if sides not in (1, 2):
        raise UsageError(f"sides must be 1 (separate bounds) or 2 (an interval); got {sides}.")
    return alpha / sides


def checked_alpha(alpha: float) -> float:
    """Return alpha if it can be an error rate."""
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie strictly between 0 and 1; got {alpha}. Usual is 0.05.")
    return alpha


def checked_counts(k: int, n: int, part: str = "k", whole: str = "n") -> tuple[int, int]:
    """Return both as whole numbers if the first can count a part of the second."""
    if k != int(k) or n != int(n) or not 0 <= k <= n:
        raise UsageError(
            f"counts must be whole numbers with 0 <= {part} <= {whole}; got {part}={k}, {whole}={n}. Count the examples "
            "again."
        )
    return int(k), int(n)
