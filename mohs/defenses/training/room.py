"""Where the points of one step may lie, for objectives that make adversarial points by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mohs import streams
from mohs.regions import Box
from mohs.threat import Threat

NO_BOX: Box = (-math.inf, math.inf)


@dataclass(frozen=True)
class Room:
    """Region and box around the inputs of one step, and a random stream for each row.

    A row is known by its content, so that its random numbers depend neither on the batch nor on the process it is in.

    Args:
        threat: region and box.
        eps: the present radius, input units.
        seed: of the step.
    """

    threat: Threat
    eps: float
    seed: int

    def radii(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """[B]: ``scale`` times the radius."""
        return x.new_full((len(x),), self.eps * scale)

    def normal(self, x: Tensor) -> Tensor:
        """Standard normal noise of the shape of ``x``."""
        return streams.normal(self._keys(x), tuple(x.shape[1:]), dtype=x.dtype)

    def start(self, x: Tensor, scale: float = 1.0, draw: int = 0) -> Tensor:
        """A random point of box and region, the latter ``scale`` times as large; each ``draw`` is another."""
        return self.threat.region.start(x, self.radii(x, scale), self.threat.box, self._keys(x, draw))

    def uniform(self, x: Tensor) -> Tensor:
        """A number in [0, 1) for each row, [B]."""
        return streams.uniform(self._keys(x, 2), ())

    def varied(self, x: Tensor) -> Tensor:
        """A radius for each row, [B]: |N(0, eps / 2)|, at most eps."""
        drawn = streams.normal(self._keys(x, 3), (), dtype=x.dtype).abs_()
        return drawn.mul_(self.eps / 2).clamp_(max=self.eps)

    def pick(self, n: int) -> int:
        """One of 0 to n - 1 for the whole step, the same in every process."""
        return int(streams.integers(streams.derive(torch.tensor([self.seed])), (), n))

    def project(self, points: Tensor, x: Tensor) -> Tensor:
        """Back into region and box."""
        return self.threat.region.project(points, x, self.radii(x), self.threat.box)

    def advance(self, points: Tensor, g: Tensor, size: float, x: Tensor) -> Tensor:
        """One step of length ``size`` along ``g``, and back into region and box."""
        radii, length = self.radii(x), x.new_full((len(x),), size)
        return self.threat.region.advance(points, g, length, x, radii, self.threat.box)

    def move(self, points: Tensor, g: Tensor, size: float, x: Tensor) -> Tensor:
        """One step of length ``size`` along ``g``, and back into the box alone."""
        length = x.new_full((len(x),), size)
        return self.threat.region.move(points, g, length, x, self.threat.box).clamp_(*self.threat.box)

    def _keys(self, x: Tensor, draw: int = 0) -> Tensor:
        return keys(x, self.seed, draw)


def keys(x: Tensor, seed: int, draw: int = 0) -> Tensor:
    """A random stream for each row [B], known by its content."""
    return streams.derive(streams.content_keys(x), seed, draw)


def slope(value: Callable[[Tensor], Tensor], x: Tensor, *, graph: bool = False) -> Tensor:
    """The gradient of a per-row ``value`` [B] with respect to its input, [B, ...]; no weight gathers a gradient.

    Args:
        value: points to numbers.
        x: where.
        graph: let gradients flow on through the answer.

    >>> slope(lambda x: x.square().sum(1), torch.tensor([[1.0, 3.0]])).tolist()
    [[2.0, 6.0]]
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(value(point).sum(), point, create_graph=graph)
    return g


def odds(logits: Tensor, y: Tensor) -> Tensor:
    """log((1 - p_y) / p_y), [B]: it grows with the cross-entropy, and its gradient has the same direction.

    The gradient of the cross-entropy is that of the odds times 1 - p_y, which is exactly zero in float32 on confident
    models; a sign, a normalised step or a cosine does not see the factor.

    >>> round(float(odds(torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([0]))), 3)  # log 2 - 40
    -39.307
    """
    own = y.unsqueeze(1)
    return logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)
