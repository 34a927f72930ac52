"""Gaussian blur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._filters import gaussian, separable
from mohs.defenses._settings import images, number


@dataclass(frozen=True)
class GaussianBlur(Defense):
    """Averages each pixel with its neighbours, weighted by a Gaussian, so that fine patterns fade.

        x -> G_sigma * x,   G_sigma(d) proportional to exp(-d^2 / (2 sigma^2))

    A linear map: its gradient is exact, and an attack that is led through it finds changes that survive the blur.

    Args:
        sigma: standard deviation in pixels, above 0. The kernel reaches ``4 sigma`` far; the border is repeated.

    Raises:
        UsageError: sigma is no number above 0.
        ModelError: at the first call, on inputs that are no images.

    Cost: two convolutions along one axis each.

    >>> GaussianBlur(1.0).transform(Tensor([[[[0.0, 0.0, 1.0, 0.0, 0.0]]]])).mul(100).round().int().flatten().tolist()
    [5, 24, 40, 24, 5]

    **Differs from the paper**: nothing.
    **Source**: W. Xu, D. Evans, Y. Qi, "Feature squeezing", NDSS 2018, section 4.2 (local smoothing).
    """

    sigma: float = 1.0
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.sigma, "sigma", 0, 100, above=True)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], blurred."""
        return separable(images(x, "GaussianBlur"), gaussian(self.sigma))
