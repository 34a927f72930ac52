"""What the sparse attacks share: from a success on n positions, look for one on fewer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mohs.errors import ThreatError
from mohs.problem import Problem
from mohs.regions import L0, per_row

MEMORY = 0.7
"""Share of the past in the averaged gradient: without an average two sets of positions replace each other for ever."""


def geometry(problem: Problem) -> tuple[L0, float]:
    """The region and the width of the box, or a ThreatError where positions are not counted or the box has no width."""
    region, (low, high) = problem.threat.region, problem.threat.box
    if not isinstance(region, L0):
        raise ThreatError(
            f"This attack counts positions; got the threat {problem.threat}. Allowed: l0 and l0-features, such as 'l0:inf'."
        )
    if math.isinf(low) or math.isinf(high):
        raise ThreatError(f"L0 allows any value inside the box; got the box {problem.threat.box}. Give a finite one.")
    return region, high - low


def unit(g: Tensor) -> Tensor:
    """Each row divided by its largest magnitude; zero stays zero."""
    top = g.abs().flatten(1).amax(1)
    return g / per_row(top.clamp_min_(torch.finfo(g.dtype).tiny), g)


def tighten(problem: Problem, g: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """A point on fewer positions than the best one found, chosen afresh by the averaged gradient; (point, new average).

        mean = MEMORY * mean + (1 - MEMORY) * g / max |g|
        x = argmax <mean, x>  over the box and the changes of at most n - 1 positions (n - n // 16 from n = 32 on)

    It is a conditional-gradient step in the ball one position smaller: what a position holds costs nothing in L0, so each
    goes to its best bound, and the positions are those that gain most there. Rows without a success take all the radius
    allows.
    """
    mean = MEMORY * mean + (1 - MEMORY) * unit(g)
    found, region = problem.found, problem.threat.region
    size = region.measure(found.x, problem.x0)
    fewer = torch.minimum(size - (size / 16).floor_().clamp_(min=1.0), problem.eps)
    count = torch.where(found.met, fewer, problem.eps)
    return region.extreme(mean, problem.x0, count, problem.threat.box), mean


def least(problem: Problem) -> Tensor:
    """[B] bool: has a row been met by a change of one position, or of none? Then nothing is left to gain."""
    return problem.found.met & (problem.threat.region.measure(problem.found.x, problem.x0) <= 1)
