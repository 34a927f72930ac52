"""Windows over images: what the blurs share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from mohs.errors import UsageError


def odd(size: int) -> None:
    """Refuse a window without a middle.

    Raises:
        UsageError: not an odd number of at least 3.
    """
    if type(size) is not int or size < 3 or size % 2 == 0:
        raise UsageError(
            f"size must be an odd whole number of at least 3, so that the window has a middle; got {size!r}."
        )


def separable(x: Tensor, kernel: Tensor) -> Tensor:
    """Images [B, C, H, W] convolved with ``kernel`` [K] along both axes, each channel alone; the border is repeated."""
    channels, reach = x.shape[1], len(kernel) // 2
    kernel = kernel.to(x)
    x = pad(x, (reach, reach, reach, reach), mode="replicate")
    x = conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def windows(x: Tensor, size: int) -> Tensor:
    """The ``size`` x ``size`` neighbourhood of every pixel, [B, C, H, W, size * size]; the border is repeated."""
    reach = size // 2
    around = pad(x, (reach, reach, reach, reach), mode="replicate")
    return around.unfold(2, size, 1).unfold(3, size, 1).flatten(4)


def gaussian(sigma: float) -> Tensor:
    """Weights of a Gaussian, [2 r + 1] with r four standard deviations, that sum to one; float64."""
    reach = max(1, int(4 * sigma + 0.5))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return weights / weights.sum()
