"""Median blur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._filters import odd, windows
from mohs.defenses._settings import images


@dataclass(frozen=True)
class MedianBlur(Defense):
    """Replaces each pixel by the median of the square window around it: single outliers vanish, edges stay.

        x_ij -> median of x over the size x size window at (i, j)

    Almost everywhere the median is one of the pixels, so its gradient goes to that pixel and to no other.

    Args:
        size: side of the window in pixels, odd, at least 3; the border is repeated.

    Raises:
        UsageError: another size.
        ModelError: at the first call, on inputs that are no images.

    Cost: a selection among size^2 values per pixel.

    >>> MedianBlur(3).transform(Tensor([[[[2.0, 9.0, 1.0, 2.0, 3.0]]]])).flatten().tolist()
    [2.0, 2.0, 2.0, 2.0, 3.0]

    **Differs from the paper**: windows have a middle; the paper also uses 2 x 2.
    **Source**: W. Xu, D. Evans, Y. Qi, "Feature squeezing", NDSS 2018, section 4.2 (local smoothing).
    """

    size: int = 3
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        odd(self.size)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], each pixel the median around it."""
        return windows(images(x, "MedianBlur"), self.size).median(-1).values
