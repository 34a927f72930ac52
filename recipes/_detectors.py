"""The detectors of the recipes, each fitted before a net that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _papers import FASHION
from torch import nn

import mohs
from mohs import defenses
from mohs.attacks import PGD
from mohs.data import load

THREAT = mohs.Threat.parse("linf:0.1")
Fit = Callable[[nn.Module], nn.Module]


def taught(defense: Any, n: int = 500, *, labels: bool = False) -> Fit:
    """A detector fitted on PGD's changes of so many training images."""

    def fit(net: nn.Module) -> nn.Module:
        data = load(FASHION, split="train", n=n)
        found = mohs.attack(PGD(steps=20), net, data.x, data.y, THREAT)
        return defense.fit(net, data.x, *([data.y] if labels else []), found.x, found.success).eval()

    return fit


def learnt_from_clean(defense: Any, n: int) -> Fit:
    """A detector fitted on so many clean training images."""
    return lambda net: defense.fit(net, load(FASHION, split="train", n=n).x).eval()


def trapped(net: nn.Module) -> nn.Module:
    """Trapdoors planted with 20,000 training images: half a minute on one core."""
    data = load(FASHION, split="train", n=20_000)
    return defenses.Trapdoor().fit(net, data.x, data.y).eval()


DETECTORS: dict[str, Fit] = {
    "lid": taught(defenses.LID()),
    "mahalanobis": taught(defenses.Mahalanobis(), 1000, labels=True),
    "binary-detector": taught(defenses.BinaryDetector(width=32), 1000),
    "pca-whitening": learnt_from_clean(defenses.PCAWhitening(), 4000),
    "trapdoor": trapped,
    "magnet": learnt_from_clean(defenses.MagNet(), 2000),
    "feature-squeezing": learnt_from_clean(defenses.FeatureSqueezing(), 1000),
}
"""By name, with as many training images as each needs."""
