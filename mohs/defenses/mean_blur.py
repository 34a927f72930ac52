"""Mean blur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._filters import odd, separable
from mohs.defenses._settings import images


@dataclass(frozen=True)
class MeanBlur(Defense):
    """Replaces each pixel by the mean of the square window around it.

        x_ij -> mean of x over the size x size window at (i, j)

    A linear map: its gradient is exact, and an attack that is led through it loses little.

    Args:
        size: side of the window in pixels, odd, at least 3; the border is repeated.

    Raises:
        UsageError: another size.
        ModelError: at the first call, on inputs that are no images.

    Cost: two convolutions along one axis each.

    >>> MeanBlur(3).transform(Tensor([[[[0.0, 3.0, 0.0]]]])).flatten().tolist()
    [1.0, 1.0, 1.0]

    **Differs from the paper**: nothing.
    **Source**: W. Xu, D. Evans, Y. Qi, "Feature squeezing", NDSS 2018, section 4.2 (local smoothing).
    """

    size: int = 3
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        odd(self.size)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], blurred."""
        return separable(images(x, "MeanBlur"), torch.full((self.size,), 1 / self.size, dtype=torch.float64))
