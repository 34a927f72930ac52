"""Geometry of patches: all changes inside one square window of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mohs import streams
from mohs._geometry import Box, per_row, unit_scale
from mohs.errors import ThreatError


@dataclass(frozen=True)
class Patch:
    """Any change inside one square window of ``eps`` x ``eps`` pixels of an image [B, C, H, W], to any values of the box.

    Where the window may lie anywhere the region is the union over all windows inside the image. A window wider than the image
    covers it from side to side; one at a fixed place is cut off where the image ends.

    Args:
        eps: side of the window in pixels, a whole number, or inf.
        at: (row, column) of the window's first pixel; None: the attacker chooses.

    >>> change = torch.zeros(1, 1, 6, 6)
    >>> change[0, 0, 2, 1] = change[0, 0, 4, 2] = 0.5
    >>> float(Patch(3).measure(change, torch.zeros_like(change)))
    3.0
    """

    eps: float
    at: tuple[int, int] | None = None
    kind: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        whole = isinstance(self.eps, int | float) and (math.isinf(self.eps) or float(self.eps).is_integer())
        if not (whole and self.eps >= 0):
            raise ThreatError(f"A patch has a side in pixels; got eps={self.eps!r}. Give a whole number >= 0, or inf.")
        if self.at is None:
            return
        place = tuple(self.at) if isinstance(self.at, tuple | list) else ()
        if len(place) != 2 or not all(type(v) is int and v >= 0 for v in place):
            raise ThreatError(
                f"The place of a patch is (row, column) of its first pixel; got at={self.at!r}. Give two whole numbers >= 0, or "
                "None where the attacker chooses."
            )
        object.__setattr__(self, "at", place)

    @property
    def name(self) -> str:
        """``patch``, or ``patch@10,12`` where the place is fixed."""
        return "patch" if self.at is None else f"patch@{self.at[0]},{self.at[1]}"

    def within(self, other: Patch) -> bool:
        """Is every change of this region one of the ``other``, on images of any size?"""
        if self.eps == 0:
            return True
        if other.at is None:
            return self.eps <= other.eps
        if self.at is None:
            return other.at == (0, 0) and math.isinf(other.eps)
        return all(o <= s and s + self.eps <= o + other.eps for s, o in zip(self.at, other.at, strict=True))

    def refuse(self, x: Tensor) -> None:
        """Raise where there are no images, or where they end before the patch begins.

        Raises:
            ThreatError: no [B, C, H, W], or a place outside.
        """
        if x.dim() != 4:
            raise ThreatError(
                f"A patch is a square of an image; got inputs of shape {tuple(x.shape[1:])} under {self.name}:{self.eps:g}. Give "
                "images [N, C, H, W] and flatten inside the model."
            )
        if self.at is not None and (self.at[0] >= x.shape[2] or self.at[1] >= x.shape[3]):
            raise ThreatError(
                f"The patch begins at row {self.at[0]}, column {self.at[1]}; the images have {x.shape[2]} x {x.shape[3]} pixels. "
                "Give a place inside, counted from 0."
            )

    # --- windows ------------------------------------------------------------------------------------------------------

    def sides(self, like: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the windows of radius ``eps`` [B] on images of the shape of ``like`` [..., H, W], int64 [B]."""
        height, width = like.shape[-2:]
        side = eps.clamp(max=max(height, width)).long()
        return side.clamp(max=height), side.clamp(max=width)

    def sums(self, score: Tensor, eps: Tensor) -> Tensor:
        """Sum of ``score`` [B, H, W] over the window that begins at each pixel, float64 [B, H, W]; -inf where none may."""
        height, width = score.shape[1:]
        rows, columns = self.sides(score, eps)
        total = pad(score.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
        top, left = (torch.arange(n, device=score.device) for n in (height, width))
        bottom, right = top + rows.unsqueeze(1), left + columns.unsqueeze(1)
        strip = total.gather(1, bottom.clamp(max=height).unsqueeze(2).expand(-1, -1, width + 1)) - total[:, :height]
        sums = strip.gather(2, right.clamp(max=width).unsqueeze(1).expand(-1, height, -1)) - strip[:, :, :width]
        if self.at is None:
            allowed = (bottom <= height).unsqueeze(2) & (right <= width).unsqueeze(1)
        else:
            allowed = (top == self.at[0]).unsqueeze(1) & (left == self.at[1])
        return sums.masked_fill(~allowed, -math.inf)

    def best(self, score: Tensor, eps: Tensor) -> Tensor:
        """(row, column) of the first window with the largest sum of ``score`` [B, H, W], int64 [B, 2]."""
        if self.at is not None:
            return torch.tensor(self.at, device=score.device).expand(len(score), 2)
        return corner(self.sums(score, eps).flatten(1).argmax(1), score.shape[2])

    def window(self, at: Tensor, like: Tensor, eps: Tensor) -> Tensor:
        """The pixels of the windows that begin at ``at`` [B, 2], on images like ``like``: bool [B, 1, H, W]."""
        inside = []
        for first, side, count in zip(at.unbind(1), self.sides(like, eps), like.shape[-2:], strict=True):
            away = torch.arange(count, device=like.device) - first.unsqueeze(1)
            inside.append((away >= 0) & (away < side.unsqueeze(1)))
        return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)

    def gain(self, g: Tensor, x0: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """(the best values [B, C, H, W] along ``g``, what each pixel gains by them [B, H, W] in units of the largest |g|)."""
        self.finite(box)
        best = torch.where(g > 0, box[1], box[0]).to(x0.dtype)
        best = torch.where(g == 0, x0, best)
        return best, ((best - x0) * unit_scale(g)).sum(1)

    def finite(self, box: Box) -> None:
        """Raise where the box does not bound the values.

        Raises:
            ThreatError: an infinite box.
        """
        if math.isinf(box[0]) or math.isinf(box[1]):
            raise ThreatError(f"A patch may take any value inside the box; got the box {box}. Give a finite one.")

    # --- what every region can ------------------------------------------------------------------------------------------

    def measure(self, x: Tensor, x0: Tensor) -> Tensor:
        """Side of the smallest window that holds every changed pixel, [B]; inf where one lies before a fixed place."""
        self.refuse(x0)
        changed = (x != x0).any(1)
        size = x0.new_zeros(len(x0))
        for axis, begin in zip((2, 1), self.at or (None, None), strict=True):
            touched = changed.any(axis)
            count = touched.shape[1]
            first = touched.int().argmax(1)
            end = count - touched.flip(1).int().argmax(1)
            extent = (end - (first if begin is None else begin)).to(size)
            if begin is not None:
                extent = extent.masked_fill(first < begin, math.inf)
            size = torch.maximum(size, extent.masked_fill(~touched.any(1), 0.0))
        return size

    def contains(self, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """[B] bool: is there a window of that side that holds every change?"""
        size = self.measure(x, x0)
        return (size <= eps) & size.isfinite()  # before a fixed place no radius allows anything

    def steepest(self, g: Tensor) -> Tensor:
        """Patches have no norm: no direction of unit length and no dual."""
        raise ThreatError(
            "This attack follows a norm; got the threat patch. Allowed: l1, l2, linf and other p >= 1. Use LaVAN or PGD for "
            "patches."
        )

    dual = steepest

    def shortest(self, w: Tensor, gain: Tensor, x: Tensor, box: Box) -> Tensor:
        """Patches have no norm; raises as ``steepest`` does."""
        return self.steepest(w)

    def extreme(self, g: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """Exact maximiser of <g, x>: the window with the largest gain, each value at its best bound."""
        self.refuse(x0)
        best, gain = self.gain(g, x0, box)
        return torch.where(self.window(self.best(gain, eps), x0, eps), best, x0)

    def move(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, box: Box) -> Tensor:
        """A step of ``size`` [B] along the sign of the gradient: inside its window a patch is a box, as an Linf ball is."""
        return g.sign().mul_(per_row(size, x)).add_(x)

    def advance(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """``move``, then ``project``; a row without a change yet gets the window in which the gradient promises most.

        Steps along the sign are equally long everywhere, so that the nearest point would say nothing about the place. Once there
        is a patch, small steps do not move it: other windows need other restarts.
        """
        untouched = (x == x0).flatten(1).all(1)
        moved = self.move(x, g, size, x0, box)
        if self.at is not None or not bool(untouched.any()):
            return self.project(moved, x0, eps, box)
        place = torch.where(
            untouched.unsqueeze(1),
            self.best(self.gain(g, x0, box)[1], eps),
            self.best(self._worth(moved, moved.clamp(*box), x0), eps),
        )
        return torch.where(self.window(place, x0, eps), moved.clamp_(*box), x0)

    @staticmethod
    def _worth(x: Tensor, clipped: Tensor, x0: Tensor) -> Tensor:
        """What it would cost to undo a pixel, given that the rest is clipped, [B, H, W]: |x - x0|^2 - |x - clipped|^2."""
        return ((clipped - x0) * (2 * x - x0 - clipped)).sum(1)

    def project(self, x: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """The nearest point: keep the window whose changes would cost most to undo, given that they are clipped to the box."""
        self.refuse(x0)
        clipped = x.clamp(*box)
        kept = self.window(self.best(self._worth(x, clipped, x0), eps), x0, eps)
        # what is allowed already stays to the last bit, whatever the sums round to
        kept |= per_row(self.contains(clipped, x0, eps), x0)
        return torch.where(kept, clipped, x0)

    def start(self, x0: Tensor, eps: Tensor, box: Box, key: Tensor) -> Tensor:
        """Random values in a random window."""
        self.refuse(x0)
        self.finite(box)
        values = streams.uniform(key, tuple(x0.shape[1:]), dtype=x0.dtype).mul_(box[1] - box[0]).add_(box[0])
        values.clamp_(*box)
        if self.at is not None:
            place = torch.tensor(self.at, device=x0.device).expand(len(x0), 2)
        else:
            free = torch.stack([n - side + 1 for n, side in zip(x0.shape[2:], self.sides(x0, eps), strict=True)], 1)
            place = (streams.uniform(key, (2,), draw=1, dtype=torch.float64) * free).long()
        return torch.where(self.window(place, x0, eps), values, x0)

    def default_step(self, eps: Tensor, steps: int, box: Box) -> Tensor:
        """2.5 box widths / steps: far enough from any value to any other and back."""
        self.finite(box)
        return torch.full_like(eps, 2.5 * (box[1] - box[0]) / max(steps, 1))


def corner(index: Tensor, width: int) -> Tensor:
    """(row, column) [B, 2] of positions [B] in an image of that width, counted row by row."""
    return torch.stack([index // width, index % width], 1)
