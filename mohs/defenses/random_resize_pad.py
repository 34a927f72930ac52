"""Random resizing and padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._settings import images, number
from mohs.errors import ModelError, UsageError


@dataclass(frozen=True)
class RandomResizePad(Defense):
    """Resizes each image to a random size and puts it at a random place of a black one, anew at each call.

        x -> pad(resize(x, r)),   r uniform in [least, most] of the side, the place uniform among those that fit

    A change that is tuned to single pixels misses its aim. Each draw is differentiable; an attack that averages over draws
    finds changes that work at most sizes and places.

    Args:
        least, most: smallest and largest size, as shares of the input's side; sides are rounded to pixels.
        size: side of the output in pixels, for square images or nets that take any size; None: that of the input, so
            that a net of fixed size can be defended, with ``most`` at 1 or below.

    Raises:
        UsageError: shares that are no numbers in (0, 4], or least above most.
        ModelError: at the first call, on inputs that are no images, or where the largest size does not fit into the output.

    Cost: two lookups per pixel.

    >>> RandomResizePad(1.0, 1.1, size=32).transform(torch.rand(2, 3, 28, 28)).shape
    torch.Size([2, 3, 32, 32])

    **Differs from the paper**: the images of a batch have sizes and places of their own; by default images shrink into their own size
    (the paper enlarges 299 to 310...330 and pads to 331: ``RandomResizePad(310 / 299, 330 / 299, size=331)``).
    **Source**: C. Xie, J. Wang, Z. Zhang, Z. Ren, A. Yuille, "Mitigating adversarial effects through randomization", ICLR 2018,
    section 3.2.
    """

    least: float = 0.85
    most: float = 1.0
    size: int | None = None
    random: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.least, "least", 0, 4, above=True)
        number(self.most, "most", 0, 4, above=True)
        if self.least > self.most:
            raise UsageError(f"least must not be above most; got least={self.least!r}, most={self.most!r}.")
        if self.size is not None:
            number(self.size, "size", 1, whole=True)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], resized and padded: [B, C, size, size], or as they were."""
        sides = images(x, "RandomResizePad").shape[2:]
        outer = tuple(sides) if self.size is None else (self.size, self.size)
        share = self.least + (self.most - self.least) * torch.rand(len(x), device=x.device, dtype=torch.float64)
        rows, inside = self._places(share, sides[0], outer[0])
        columns, within = self._places(share, sides[1], outer[1])
        x = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        x = x.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
        return x * (inside[:, None, :, None] & within[:, None, None, :])

    def _places(self, share: Tensor, side: int, outer: int) -> tuple[Tensor, Tensor]:
        """Of each output row (or column) [B, outer]: the input row it shows, and whether it shows one at all."""
        length = (share * side).round().long().clamp_min(1)
        if len(length) and round(self.most * side) > outer:
            raise ModelError(
                f"RandomResizePad may resize a side of {side} pixels to {round(self.most * side)}, which does not fit into {outer}. "
                "Give a smaller most, or a larger size."
            )
        free = (outer - length + 1).double()
        offset = (torch.rand(len(length), device=length.device, dtype=torch.float64) * free).long()
        place = torch.arange(outer, device=length.device) - offset[:, None]
        inside = (place >= 0) & (place < length[:, None])
        return torch.where(inside, place * side // length[:, None], 0), inside
