"""Bounds that hold at every sample size at once, so that one may look at any time and stop when the answer is clear."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mohs.errors import UsageError
from mohs.records.stats import checked_alpha, checked_counts


def confidence_sequence(
    k: int, n: int, alpha: float = 0.05, sides: int = 2, *, a: float = 1.0, b: float = 1.0
) -> tuple[float, float]:
    """Bounds on a probability that hold for all numbers of trials at once.

    For an evaluation that is looked at while it runs and ends as soon as the answer is clear: whatever the rule by which it
    stops, the bounds miss the truth with probability at most alpha. They cost width: they are 1.5 to 2 times as wide as those of
    ``clopper_pearson``, so where n was fixed beforehand those are better. They fail where the order
    of the trials depends on their answers.

    Two-sided, the bounds are all p at which ``B(a+k, b+n-k) / (B(a, b) p^k (1-p)^(n-k)) < 1 / alpha``: likelihood ratios,
    averaged over a Beta(a, b) prior, are a martingale under p, and one that starts at 1 reaches 1 / alpha with probability
    at most alpha (Ville). One-sided (``sides=1``), the prior is uniform over the values beyond p only, which makes it a
    supermartingale under all values on the near side: each bound on its own misses with probability at most alpha.

    Args:
        k: successes so far.
        n: trials so far.
        alpha: one minus the confidence.
        sides: 2 for an interval, 1 for two separate one-sided bounds.
        a, b: of the prior, two-sided only; it decides where the interval is narrow, never whether it is right.

    Returns:
        Lower and upper bound; (0, 1) when there were no trials.

    Raises:
        UsageError: not 0 <= k <= n, alpha outside (0, 1), sides other than 1 and 2, a or b not positive or given for sides=1.

    Cost: some hundred evaluations of beta functions.

    >>> [round(100 * bound, 2) for bound in confidence_sequence(900, 1000)]
    [86.16, 93.12]

    **Differs from the paper**: the one-sided form. It is strictly monotone in p, so that its bounds are unique.

    **Source**: Robbins, Statistical methods related to the law of the iterated logarithm, Annals of Mathematical Statistics
    41 (1970), for the mixture; Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence
    sequences, Annals of Statistics 49 (2021), for its use.
    """
    k, n = checked_counts(k, n)
    limit = -math.log(checked_alpha(alpha))
    if sides not in (1, 2):
        raise UsageError(f"sides must be 1 (separate bounds) or 2 (an interval); got {sides}.")
    if not (0 < a < math.inf and 0 < b < math.inf) or (sides == 1 and (a, b) != (1.0, 1.0)):
        raise UsageError(f"a and b must be positive, and 1 (the default) for sides=1; got a={a}, b={b}, sides={sides}.")
    if n == 0:
        return 0.0, 1.0

    def lowest(k: int, a: float, b: float) -> float:
        def excluded(p: float) -> bool:
            against = evidence_above(k, n, p) if sides == 1 else evidence(k, n, p, a=a, b=b)
            return bool(against >= limit)

        return edge(excluded, 0.0, k / n)

    return lowest(k, a, b), 1.0 - lowest(n - k, b, a)


def evidence(k: ArrayLike, n: ArrayLike, p: ArrayLike, *, a: float = 1.0, b: float = 1.0) -> NDArray[np.float64]:
    """Logarithm of the evidence against the probability p, from either side; arrays are taken, element by element.

    It reaches log(1 / alpha) at any n with probability at most alpha if p is the truth.
    """
    from scipy.special import betaln, xlog1py, xlogy

    k, n, p = np.asarray(k, float), np.asarray(n, float), np.asarray(p, float)
    found: NDArray[np.float64] = betaln(a + k, b + n - k) - betaln(a, b) - xlogy(k, p) - xlog1py(n - k, -p)
    return found


def evidence_above(k: ArrayLike, n: ArrayLike, p: ArrayLike) -> NDArray[np.float64]:
    """Logarithm of the evidence against 'the probability is at most p', 0 <= p < 1; arrays are taken, element by element.

    It reaches log(1 / alpha) at any n with probability at most alpha if the truth is p or less.

    >>> round(float(evidence_above(5, 5, 0.5)), 6) == round(math.log((2**6 - 1) / 6), 6)
    True
    """
    from scipy.special import betainc, betaln, xlog1py, xlogy

    k, n, p = np.asarray(k, float), np.asarray(n, float), np.asarray(p, float)
    with np.errstate(divide="ignore"):  # where next to nothing of the prior's weight is left, there is no evidence
        beyond = np.log(betainc(n - k + 1, k + 1, 1 - p))
    found: NDArray[np.float64] = betaln(k + 1, n - k + 1) + beyond - xlogy(k, p) - xlog1py(n - k + 1, -p)
    return found


def finite_sequence(k: int, n: int, total: int, alpha: float = 0.05) -> tuple[int, int]:
    """One-sided bounds on the successes among ``total`` things, drawn without replacement, that hold for all n at once.

    For an evaluation of a test set of known size, in random order, that ends when the answer is clear. At n = total both
    are k. The evidence against 'at least K' is the mean likelihood ratio of all smaller numbers against K, a supermartingale
    under every number from K on, as the chance of a success grows with the number that is left.

    Args:
        k: successes so far.
        n: draws so far.
        total: how many things there are.
        alpha: the error rate of each bound; they must not be used together.

    Returns:
        Lower and upper bound on the number of successes among all.

    Raises:
        UsageError: not 0 <= k <= n <= total, or alpha outside (0, 1).

    Cost: some operations on arrays of ``total`` numbers.

    >>> finite_sequence(40, 100, 1000)
    (265, 542)

    **Differs from the paper**: a one-sided mixture instead of the ratio of prior and posterior at one number.

    **Source**: Waudby-Smith and Ramdas, Confidence sequences for sampling without replacement, NeurIPS 2020, section 2.
    """
    k, n = checked_counts(k, n)
    n, total = checked_counts(n, total, "n", "total")
    checked_alpha(alpha)
    return total - _finite_upper(n - k, n, total, alpha), _finite_upper(k, n, total, alpha)


def _finite_upper(k: int, n: int, total: int, alpha: float) -> int:
    from scipy.special import gammaln

    many = np.arange(k, total - (n - k) + 1)  # no other numbers are possible
    rest = total - many
    log = gammaln(many + 1) - gammaln(many - k + 1) + gammaln(rest + 1) - gammaln(rest - (n - k) + 1)
    likelihood = np.exp(log - log.max())
    top = int(likelihood.argmax())
    # the smaller numbers, also those that are impossible and have no likelihood, share the weight; up to the top their
    # mean is below the likelihood itself, so nothing is excluded there
    smaller = np.concatenate([[0.0], likelihood.cumsum()[:-1]])
    kept = smaller[top:] * alpha < likelihood[top:] * np.maximum(many[top:], 1)
    return int(many[top:][kept].max(initial=many[top]))


def mean_bounds(values: ArrayLike, alpha: float = 0.05, sides: int = 2) -> tuple[float, float]:
    """Bounds on the mean of independent values in [0, 1], by betting; they hold at every sample size at once.

    For models with randomness of their own: the score of an example is the share of fresh draws on which it stays right, and
    scores are no coin tosses, so binomial bounds over all draws would be wrong. Scores that vary little get narrow bounds.

    For a candidate mean m, a gambler bets on each value exceeding m, with a stake that rests on earlier values only:
    ``K_t = prod (1 + s_t (x_t - m))``, with ``s_t = min(sqrt(2 log(1/alpha) / (v_{t-1} t log(t+1))), c / m)`` and ``v`` the
    running variance. Where the truth is m or less, he gets 1 / alpha times richer at any time with probability at most
    alpha; the lower bound is the smallest m at which he is not, after the last value. For the upper bound, he bets on 1 - x.

    Args:
        values: the scores [N] in an order that does not depend on them.
        alpha: one minus the confidence.
        sides: 2 for an interval, 1 for two separate one-sided bounds.

    Returns:
        Lower and upper bound on the mean; (0, 1) without values.

    Raises:
        UsageError: values outside [0, 1] or not finite, alpha outside (0, 1), or sides other than 1 and 2.

    Cost: about 60 passes over the values.

    >>> low, high = mean_bounds([0.5] * 200)
    >>> 0.45 < low < 0.5 < high < 0.55
    True

    **Differs from the paper**: two one-sided bounds, each at its share of alpha, instead of one capital hedged between both.

    **Source**: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 86 (2024), section 4,
    predictable plug-in; c = 3/4 (appendix).
    """
    x = np.asarray(values, float)
    if x.ndim != 1 or not ((x >= 0) & (x <= 1)).all():
        raise UsageError(
            f"values must be a list of finite numbers in [0, 1]; got shape {x.shape}"
            + (f" from {x.min():g} to {x.max():g}." if x.size else ".")
            + " Give one score per example: the share of draws on which it stays right."
        )
    if sides not in (1, 2):
        raise UsageError(f"sides must be 1 (separate bounds) or 2 (an interval); got {sides}.")
    tail = checked_alpha(alpha) / sides
    if not len(x):
        return 0.0, 1.0

    def lowest(x: NDArray[np.float64]) -> float:
        return edge(lambda m: bool(log_capital(x, m, tail)[-1] >= -math.log(tail)), 0.0, 1.0)

    return lowest(x), 1.0 - lowest(1.0 - x)


def log_capital(x: NDArray[Any], m: float, alpha: float) -> NDArray[np.float64]:
    """Logarithm of what the gambler of ``mean_bounds`` has after each value [..., N], if he bets against means up to m.

    It falls strictly with m, and reaches log(1 / alpha) at any time with probability at most alpha if the mean is m or less.
    """
    t = np.arange(1, x.shape[-1] + 1)
    mean = (0.5 + x.cumsum(-1)) / (t + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum(-1)) / (t + 1)
    before = np.concatenate([np.full((*x.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    stake = np.sqrt(-2 * math.log(alpha) / (before * t * np.log(t + 1)))
    most = 0.75 / m if m > 0 else math.inf
    found: NDArray[np.float64] = np.log1p(np.minimum(stake, most) * (x - m)).cumsum(-1)
    return found


def edge(excluded: Callable[[float], bool], low: float, high: float) -> float:
    """Where values from ``low`` on cease to be excluded, as far as floats tell; ``low`` if it is not, ``high`` never is."""
    if not excluded(low):
        return low
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return low
        if excluded(middle):
            low = middle
        else:
            high = middle
