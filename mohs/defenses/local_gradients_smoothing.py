"""Local gradients smoothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._settings import images, number
from mohs.errors import UsageError


@dataclass(frozen=True)
class LocalGradientsSmoothing(Defense):
    """Darkens each region in which neighbouring pixels differ much, as they do inside a patch.

        g = ||(d/dx, d/dy) grey(x)||, per image scaled to [0, 1]
        mask = union of the blocks in which the mean of g exceeds ``threshold``
        x -> x (1 - clip(strength g mask, 0, 1))

    A patch of noise vanishes; so do textures. A patch made against it is smooth, or pushes up the largest g of the image
    so that its own blocks stay below the threshold. The own gradient is exact but for the threshold, and
    zero where pixels are darkened to nothing: an attack would stay put there. So the mean of the defense and the identity
    stands in, which broke more than either alone.

    Args:
        strength: how much is taken away for each unit of g.
        threshold: mean of g above which a block is smoothed, from 0 to 1.
        block: side of the blocks in pixels.
        overlap: pixels that neighbouring blocks share, below ``block``.

    Raises:
        UsageError: other numbers.
        ModelError: at the first call, on inputs that are no images.

    Cost: a few operations per pixel.

    >>> x = torch.zeros(1, 1, 4, 4)
    >>> x[..., :2, :2] = torch.eye(2)
    >>> LocalGradientsSmoothing(block=2, overlap=0).transform(x).abs().sum().item()
    0.0

    **Differs from the paper**: the last blocks of a row or column end with the image (the common code leaves up to stride - 1
    pixels at these edges unguarded, where a patch is safe); of a colour image the mean of the channels is its grey. The paper's
    numbers are for images of 299 pixels; on small ones take smaller blocks.
    **Source**: M. Naseer, S. Khan, F. Porikli, "Local gradients smoothing: defense against localized adversarial attacks", WACV
    2019, section 3, equations 3 to 6.
    """

    strength: float = 2.3
    threshold: float = 0.1
    block: int = 15
    overlap: int = 5

    def __post_init__(self) -> None:
        number(self.strength, "strength", 0, above=True)
        number(self.threshold, "threshold", 0, 1)
        number(self.block, "block", 1, whole=True)
        number(self.overlap, "overlap", 0, whole=True)
        if self.overlap >= self.block:
            raise UsageError(f"overlap must be below block, which is {self.block}; got {self.overlap}.")

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], darkened where neighbouring pixels differ."""
        g = steepness(images(x, "LocalGradientsSmoothing"))
        return x * (1 - (self.strength * g * self.mask(g)).clamp(0, 1))

    def stand_in(self, x: Tensor) -> Tensor:
        """Half of the defense, half of the input."""
        return (x + self.transform(x)) / 2

    def mask(self, g: Tensor) -> Tensor:
        """1 in every block whose mean of ``g`` [B, 1, H, W] exceeds the threshold, else 0."""
        height, width = g.shape[2:]
        side = (min(self.block, height), min(self.block, width))
        mask = torch.zeros_like(g)
        for top in begins(height, side[0], self.block - self.overlap):
            for left in begins(width, side[1], self.block - self.overlap):
                here = (slice(None), slice(None), slice(top, top + side[0]), slice(left, left + side[1]))
                loud = (g[here].detach().mean((2, 3), keepdim=True) > self.threshold).to(g)
                mask[here] = torch.maximum(mask[here], loud)
        return mask


def steepness(x: Tensor) -> Tensor:
    """Length of the difference to the next pixels, of grey, scaled to [0, 1] per image, [B, 1, H, W]; 0 where it is constant."""
    grey = x.mean(1, keepdim=True)
    down, across = torch.zeros_like(grey), torch.zeros_like(grey)
    down[:, :, :-1] = grey[:, :, 1:] - grey[:, :, :-1]
    across[:, :, :, :-1] = grey[:, :, :, 1:] - grey[:, :, :, :-1]
    # the root has no derivative at 0
    g = (down.square() + across.square()).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    low, high = g.amin((2, 3), keepdim=True), g.amax((2, 3), keepdim=True)
    return (g - low) / (high - low).clamp_min(torch.finfo(x.dtype).eps)


def begins(length: int, side: int, stride: int) -> list[int]:
    """Where blocks begin along a side; the last one ends with it."""
    return [*range(0, length - side, stride), length - side]
