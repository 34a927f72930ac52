"""Adam per row, and the variable that keeps a point inside the box: what Carlini and Wagner's attacks descend with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mohs._rows import Rows
from mohs.regions import Box, per_row

MEAN, SQUARE = 0.9, 0.999
"""Adam's decay rates, the published ones."""

EDGE = 1 - 1e-6
"""Clean inputs start at this share of the half width from the middle: at a bound itself the variable has no gradient."""


@dataclass
class Adam(Rows):
    """``mean`` and ``square`` [B, ...]: running moments of the gradient; ``age`` [B]: steps since they were zero.

    There is no constant beside the root: gradients of any scale step as far.

    **Source**: D. Kingma, J. Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
    """

    mean: Tensor
    square: Tensor
    age: Tensor

    @classmethod
    def fresh(cls, like: Tensor) -> Self:
        """Before the first step."""
        return cls(torch.zeros_like(like), torch.zeros_like(like), like.new_zeros(len(like), dtype=torch.int64))

    def move(self, gradient: Tensor, rate: Tensor) -> tuple[Tensor, Self]:
        """The change that descends along ``gradient``, about ``rate`` [B] long per coordinate, and the moments after it."""
        mean = torch.lerp(gradient, self.mean, MEAN)
        square = torch.lerp(gradient.square(), self.square, SQUARE)
        age = (self.age + 1).to(gradient.dtype)
        length = rate * (1 - SQUARE**age).sqrt() / (1 - MEAN**age)
        change = mean / square.sqrt().clamp_min_(torch.finfo(mean.dtype).tiny)
        return change.mul_(per_row(-length, mean)), type(self)(mean, square, self.age + 1)

    def restart(self, rows: Tensor) -> Self:
        """Forget the moments of the rows [B] bool."""
        wide = per_row(rows, self.mean)
        return type(self)(
            self.mean.masked_fill(wide, 0.0), self.square.masked_fill(wide, 0.0), self.age.masked_fill(rows, 0)
        )


def to_variable(x: Tensor, box: Box) -> Tensor:
    """The variable of a point: x = middle + half width * sin(w) where the box is finite, else x itself."""
    if math.isinf(box[1] - box[0]):
        return x.clone()
    return (x - box[0]).mul_(2 * EDGE / (box[1] - box[0])).sub_(EDGE).asin_()


def to_point(w: Tensor, box: Box) -> Tensor:
    """The point of a variable, inside the box to the last bit."""
    if math.isinf(box[1] - box[0]):
        return w.clamp(*box)
    return w.sin().add_(1).mul_((box[1] - box[0]) / 2).add_(box[0]).clamp_(*box)


def slope(w: Tensor, box: Box) -> Tensor | float:
    """How fast the point moves with the variable."""
    return 1.0 if math.isinf(box[1] - box[0]) else w.cos().mul_((box[1] - box[0]) / 2)
