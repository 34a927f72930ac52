"""Noise on the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._settings import number


@dataclass(frozen=True)
class NoiseInput(Defense):
    """Adds fresh Gaussian noise to each input at each call, so that a small change is one among many.

        x -> x + sigma u,   u standard normal

    Each draw is differentiable; an attack that averages over draws sees the expected loss, and breaks it.

    Args:
        sigma: standard deviation in units of the input, above 0.

    Raises:
        UsageError: sigma is no number above 0.

    Cost: none worth naming.

    >>> x = torch.zeros(1, 1000)
    >>> bool(0.08 < NoiseInput(0.1).transform(x).std() < 0.12)
    True

    **Differs from the paper**: one draw at the input only; no layer inside the net has noise, and the net need not be trained
    with it. Values may leave the box.
    **Source**: X. Liu, M. Cheng, H. Zhang, C.-J. Hsieh, "Towards robust neural networks via random self-ensemble", ECCV 2018,
    section 3.1 (its noise layer before the first convolution).
    """

    sigma: float = 0.1
    random: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.sigma, "sigma", 0, above=True)

    def transform(self, x: Tensor) -> Tensor:
        """Inputs [B, ...] with noise."""
        return x + self.sigma * torch.randn_like(x)
