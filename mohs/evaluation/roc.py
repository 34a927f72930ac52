"""How well a score tells attacked inputs from clean ones: the receiver operating characteristic, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mohs.defenses._detector import least
from mohs.errors import DataError, UsageError
from mohs.records.stats import clopper_pearson


@dataclass(frozen=True, eq=False)
class ROC:
    """Scores of clean and of attacked inputs; the higher a score, the more its input looks attacked.

        AUC = P(attacked > clean) + P(attacked = clean) / 2

    It says how well a detector works against inputs that were made in one way. Inputs of an attack that knows the detector are
    another matter than those of one that does not, so look at both, and never at the second alone.

    Args:
        clean: scores [n] of unchanged inputs.
        attacked: scores [m] of attacked ones, of those alone that the classifier answers wrongly: what fools nobody need not be
            detected.

    Raises:
        DataError: an empty set, or scores that are nan.

    >>> roc = ROC([0.1, 0.2, 0.3, 0.4], [0.35, 0.5])
    >>> roc.auc, roc.rate(0.25)[0]
    (0.875, 0.5)

    **Differs from the paper**: DeLong et al. compare several scores; this is the case of one, on the scale of the logit.
    **Source**: E. DeLong, D. DeLong, D. Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
    characteristic curves: a nonparametric approach", Biometrics 44 (1988), for the interval; the threshold is the order statistic of
    split conformal prediction, as that of Mohs's detectors.
    """

    clean: Any
    attacked: Any

    def __post_init__(self) -> None:
        for name in ("clean", "attacked"):
            scores: NDArray[np.float64] = np.asarray(getattr(self, name), float).ravel()
            if not len(scores) or np.isnan(scores).any():
                bad = "none" if not len(scores) else f"{int(np.isnan(scores).sum())} of {len(scores)} are nan"
                raise DataError(f"ROC needs scores of {name} inputs, one number or more, none of them nan; got {bad}.")
            object.__setattr__(self, name, np.sort(scores))

    @cached_property
    def _places(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Per attacked score the share of clean ones below, and per clean one that of attacked ones above; ties count half."""
        return _below(self.attacked, self.clean), 1 - _below(self.clean, self.attacked)

    @property
    def auc(self) -> float:
        """The area under the curve, 0 to 1; 0.5 is guessing."""
        return float(self._places[0].mean())

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        """Two-sided bounds on the area. Where one set lies wholly above the other, all scores are equal, or one set holds a single
        score, they say nothing: 0 and 1."""
        _level(alpha)
        above, below = self._places
        area = self.auc
        if min(len(above), len(below)) < 2 or not 0 < area < 1:
            return 0.0, 1.0
        spread = math.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))
        if not spread:
            return 0.0, 1.0
        middle = math.log(area / (1 - area))
        half = NormalDist().inv_cdf(1 - alpha / 2) * spread / (area * (1 - area))
        return _logistic(middle - half), _logistic(middle + half)

    def rate(self, fpr: float, alpha: float = 0.05) -> tuple[float, float, float]:
        """The share of attacked inputs that is flagged where at most a share ``fpr`` of further clean ones is, and two-sided bounds.

        The threshold is an order statistic of the clean scores. The bounds are those of Clopper and Pearson for that threshold.

        Raises:
            DataError: fewer clean scores than resolve the rate.
        """
        if not 0 < fpr < 1:
            raise UsageError(f"fpr must lie between 0 and 1; got {fpr!r}.")
        _level(alpha)
        n = len(self.clean)
        if n < least(fpr):
            raise DataError(
                f"A false-positive rate of {fpr:g} takes at least {least(fpr)} clean scores; got {n}. Give more, or a larger rate."
            )
        threshold = self.clean[math.ceil((1 - fpr) * (n + 1)) - 1]
        flagged = int((self.attacked > threshold).sum())
        return flagged / len(self.attacked), *clopper_pearson(flagged, len(self.attacked), alpha)

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """False-positive and true-positive rates [k] for every threshold, from (0, 0) to (1, 1)."""
        thresholds = np.unique(np.concatenate([self.clean, self.attacked]))[::-1]
        rates = [
            np.concatenate([[0.0], 1 - np.searchsorted(scores, thresholds, side="left") / len(scores)])
            for scores in (self.clean, self.attacked)
        ]
        return rates[0], rates[1]


def _below(values: NDArray[np.float64], ranked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of ``ranked`` below each value; equal ones count half."""
    found: NDArray[np.float64] = (
        np.searchsorted(ranked, values, "left") + np.searchsorted(ranked, values, "right")
    ) / 2
    return found / len(ranked)


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _level(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise UsageError(f"alpha must lie between 0 and 1; got {alpha!r}.")
