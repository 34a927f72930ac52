"""Exact binomial statistics: Clopper-Pearson bounds and McNemar's test."""

from __future__ import annotations

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
    k, n = _counts(k, n)
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie strictly between 0 and 1; got {alpha}. Usual is 0.05.")
    if sides not in (1, 2):
        raise UsageError(f"sides must be 1 (separate bounds) or 2 (an interval); got {sides}.")
    from scipy.special import betaincinv

    tail = alpha / sides
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
    k, n = _counts(min(b, c), b + c)
    term, tail = 1, 1
    for i in range(k):  # whole numbers throughout: exact for any counts
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def _counts(k: int, n: int) -> tuple[int, int]:
    if k != int(k) or n != int(n) or not 0 <= k <= n:
        raise UsageError(f"counts must be whole numbers with 0 <= k <= n; got k={k}, n={n}.")
    return int(k), int(n)
