"""How often the bounds and verdicts are wrong, over 10,000 simulated evaluations whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from mohs.evaluation.confirmation import ALPHA as CONFIRMED
from mohs.evaluation.confirmation import EARLY, needed
from mohs.evaluation.evidence import Counts
from mohs.records import clopper_pearson, finite_bounds, finite_sequence, median_interval
from mohs.records.anytime import confidence_sequence, log_capital

from .measure import table
from .simulated import ALPHA, RUNS, SIZES, TOTAL, N, decks, paths, sizes
from .subjects import Options

ROWS = 60  # scores of each simulated random model
SHARES = (0.05, 0.3, 0.5, 0.6, 0.9, 0.99)


def run(options: Options) -> Iterator[str]:
    """One table: what was promised, and what came."""
    yield "## Bounds and verdicts, simulated"
    yield (
        f"{RUNS:,} evaluations each, of up to {N} examples, seed fixed. 'Any n': looked at after every example, and wrong if ever. "
        f"Promised is at most {ALPHA} (one-sided bounds: {ALPHA} each); three standard errors of a share of {ALPHA} are "
        f"{3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS):.4f}. The last lines break the promise on purpose: bounds for a fixed n, "
        "looked at after every example."
    )
    rows = [*_sequences(), *_fixed(), *_finite(), *_means(), *_confirmed(), *_medians(), *_peeking()]
    head = ["what", "truth", "wrong below", "wrong above", "median n at the verdict"]
    options.keep("simulations", [dict(zip(head, row, strict=True)) for row in rows])
    yield table(head, rows)


def _bounds(of: Callable[..., tuple[float, float]], *more: object) -> NDArray[np.float64]:
    """(low, high) by n - 1 and k, from the function that verdicts use."""
    found = np.zeros((N, N + 1, 2))
    for n in range(1, N + 1):
        for k in range(n + 1):
            found[n - 1, k] = of(k, n, *more)
    return found


def _share(wrong: NDArray[np.bool_]) -> str:
    return f"{wrong.mean():.4f}"


def _sequences() -> Iterator[list[object]]:
    one, two = _bounds(confidence_sequence, ALPHA, 1), _bounds(confidence_sequence, ALPHA, 2)
    for p in SHARES:
        k = paths(p)
        low, high = (two[np.arange(N), k][..., side] for side in (0, 1))
        yield ["share, any n, two-sided (sum of both)", p, _share((low > p).any(1)), _share((high < p).any(1)), "-"]
    for tau in (0.3, 0.6, 0.9):
        for truth in (tau, tau - 0.05, tau + 0.05, tau - 0.25):
            k = paths(truth)
            low, high = (one[np.arange(N), k][..., side] for side in (0, 1))
            refuted, upheld = high < tau, low >= tau
            ended = refuted | upheld
            at = np.where(ended.any(1), ended.argmax(1), N - 1)
            first = np.arange(RUNS), at
            false = upheld[first] if truth < tau else np.zeros(RUNS, bool)
            true = refuted[first] if truth >= tau else np.zeros(RUNS, bool)
            yield [
                f"verdict on accuracy >= {tau}, stopped when decided", f"{truth:.2f}", f"upheld falsely {_share(false)}",
                f"refuted falsely {_share(true)}", f"{np.median(at + 1):.0f} ({ended.any(1).mean():.0%} decided)",
            ]  # fmt: skip


def _fixed() -> Iterator[list[object]]:
    one = np.array([clopper_pearson(k, N, ALPHA, 1) for k in range(N + 1)])
    for p in SHARES:
        low, high = one[paths(p)[:, -1]].T
        yield [f"share, fixed n = {N}, one-sided", p, _share(low > p), _share(high < p), "-"]


def _finite() -> Iterator[list[object]]:
    steps = range(5, TOTAL + 1, 5)
    for many in (4, 60, 100, 119):
        k = decks(many)
        seen, where = np.unique(k[:, 49], return_inverse=True)
        fixed = np.array([finite_bounds(int(s), 50, TOTAL, ALPHA, 1) for s in seen])[where]
        yield [f"test set of {TOTAL}, fixed n = 50", many, _share(fixed[:, 0] > many), _share(fixed[:, 1] < many), "-"]
        below, above = np.zeros(RUNS, bool), np.zeros(RUNS, bool)
        for n in steps:
            seen, where = np.unique(k[:, n - 1], return_inverse=True)
            low, high = np.array([finite_sequence(int(s), n, TOTAL, ALPHA) for s in seen])[where].T
            below |= low > many
            above |= high < many
        yield [f"test set of {TOTAL}, every fifth n", many, _share(below), _share(above), "-"]


def _means() -> Iterator[list[object]]:
    """The bounds of ``mean_bounds`` pass the truth when, and as long as, the gambler who bets against it is rich enough."""
    rng = np.random.default_rng(7)
    for name, x, truth in (
        ("shares of five draws", rng.binomial(5, 0.7, (RUNS, ROWS)) / 5, 0.7),
        ("u-shaped", rng.beta(0.2, 0.1, (RUNS, ROWS)), 2 / 3),
    ):
        below, above = ([_ever_rich(row, m) for row in values] for values, m in ((x, truth), (1 - x, 1 - truth)))
        label = f"mean score, any n up to {ROWS}, {name}"
        yield [label, f"{truth:.3f}", _share(np.array(below)), _share(np.array(above)), "-"]


def _ever_rich(x: NDArray[np.float64], m: float) -> bool:
    return bool((log_capital(x, m, ALPHA) >= -math.log(ALPHA)).any())


def _confirmed() -> Iterator[list[object]]:
    """Robust accuracy of random models: every example that withstands is attacked with points that are wrong in exactly half
    of their draws, the hardest that withstanding allows, and all others are broken."""
    rng = np.random.default_rng(11)
    draws, looks, n = 100, 10, 100
    for p in SHARES:
        robust = rng.binomial(n, p, RUNS)
        first = rng.binomial(draws // EARLY, 0.5, (int(robust.sum()), looks))
        wrong = first + rng.binomial(draws - draws // EARLY, 0.5, first.shape)
        early, late = ([needed(n, look + 1) for look in range(looks)] for n in (draws // EARLY, draws))
        # points that are given up early are counted as if they were not: no fewer errors
        luck = ((first >= early) | (wrong >= late)).any(1)
        survived = robust - np.bincount(np.repeat(np.arange(RUNS), robust)[luck], minlength=RUNS)
        upper = np.array([Counts(threat="t", n=n, survived=k, error=CONFIRMED).kept for k in range(n + 1)])[survived]
        label = f"random model, n = {n}, {looks} looks at each example"
        yield [label, p, "-", _share(upper < p), "-"]


def _medians() -> Iterator[list[object]]:
    for broken in (0.2, 0.8):
        found, truth = sizes(broken)
        bounds = np.array([median_interval(row, ALPHA, 1) for row in found])
        yield [
            f"median of {SIZES} sizes, {1 - broken:.0%} not found", f"{truth:.3f}", _share(bounds[:, 0] > truth),
            _share(bounds[:, 1] < truth), "-",
        ]  # fmt: skip


def _peeking() -> Iterator[list[object]]:
    one = _bounds(clopper_pearson, ALPHA, 1)
    for p in SHARES:
        low, high = (one[np.arange(N), paths(p)][..., side] for side in (0, 1))
        yield [
            "PROMISE BROKEN: fixed-n bounds, any n from 10",
            p,
            _share((low > p)[:, 9:].any(1)),
            _share((high < p)[:, 9:].any(1)),
            "-",
        ]
