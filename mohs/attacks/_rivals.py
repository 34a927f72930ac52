"""The rival classes of a row, and which of their linearised boundaries is the nearest: what DeepFool and its kin walk to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mohs._rows import Rows
from mohs.look import View
from mohs.problem import Problem
from mohs.regions import Region, per_row
from mohs.target import rounding

SPREAD = 4.0
"""By how much the gradients of a row's classes may differ, and grow on the way to the boundary: what would be farther away
even so is not linearised."""

BACK = 0.1
"""How far back towards the clean input the classes are compared: on a boundary its own class would always be the nearest."""


def candidates(problem: Problem, view: View, count: int) -> Tensor:
    """Rivals of highest logit, [B, c]; one of them where the rows have a class to reach or to aim at."""
    goal, logits = problem.goal, view.logits
    if bool((goal.reach | (goal.aim >= 0)).any()):
        raised, lowered = goal.contest(logits)
        return torch.where(goal.reach, lowered, raised).unsqueeze(1)
    others = logits.scatter(1, goal.label.unsqueeze(1), -math.inf)
    if goal.reject is not None:
        others[:, goal.reject] = -math.inf  # a rejected input is no success
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def pairs(problem: Problem, view: View, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(class to raise, class to lower) for each candidate, [B, c] each; the same class twice where there is no such boundary.

    Where there are too few other classes, or their logits are -inf, the label may be among its own rivals.
    """
    goal = problem.goal
    if goal.reject is None and not bool(goal.reach.any()):
        return classes, goal.label.unsqueeze(1).expand_as(classes)
    raised, lowered = (c.unsqueeze(1) for c in goal.contest(view.logits))  # both may change from step to step
    if bool(goal.reach.any()):
        return raised, lowered
    none = (classes == goal.label.unsqueeze(1)) | (classes == goal.reject)
    return classes, torch.where(none, classes, lowered)


def contrast(view: View, raised: Tensor, lowered: Tensor) -> Tensor:
    """The cotangent of one logit minus another, [B, K], for classes [B, 1]."""
    return torch.zeros_like(view.logits).scatter_(1, raised, 1.0).scatter_(1, lowered, -1.0)


def likely(norm: Tensor) -> Tensor:
    """Gradient norms [B, c], that of a class never seen like the largest seen."""
    return torch.where(norm > 0, norm, norm.amax(1, keepdim=True).clamp_min(torch.finfo(norm.dtype).tiny))


@dataclass
class Nearest:
    """The nearest boundary: ``distance`` [B] (inf: no gradient anywhere) and gradient ``w`` [B, ...] of the candidate at
    ``place`` [B]. ``steep``: the gradient of the first candidate; ``norm`` [B, c]: the dual norms as last seen;
    ``visited`` [B]: how many were linearised."""

    distance: Tensor
    w: Tensor
    place: Tensor
    steep: Tensor
    norm: Tensor
    visited: Tensor


def find_nearest(
    view: View,
    pair: tuple[Tensor, Tensor],
    order: Tensor,
    visits: int,
    gap: Tensor,
    norm: Tensor,
    spread: Tensor | float,
    measure: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    first: Tensor,
    further: Tensor,
) -> Nearest:
    """Linearise the ``visits`` first candidates of an ``order`` [B, c], and of these only those that may be the nearest.

    They may if their ``gap`` [B, c] would be nearer with a gradient ``spread`` times as large as last seen. One backward
    each, memory O(batch x inputs). ``measure(c, w)`` gives the gradient to keep, its dual norm, and the distance.

    Args:
        first: rows that linearise their first candidate, [B] bool.
        further: rows that go on to further ones; who has passed over one passes over all that follow.
    """
    distance, visited = torch.full_like(gap[:, 0], math.inf), torch.zeros_like(gap[:, 0])
    best: Tensor | None = None
    place, norm, worth = torch.zeros_like(order[:, 0]), norm.clone(), first
    for j in range(visits):
        c = order[:, j : j + 1]
        if j:
            further = further & _worth(distance, gap, norm, c, spread)
            worth = further
            if not bool(worth.any()):
                break  # and so for all that follow
        w = view.pull(contrast(view, pair[0].gather(1, c), pair[1].gather(1, c)), keep=j < visits - 1, rows=worth)
        if best is None:
            steep, best = w, torch.zeros_like(w)
        w, dual, far = measure(c, w)
        # a row keeps to its own rule: what its batch mates still want to see must not change it
        norm.scatter_(1, c, torch.where(worth, dual, norm.gather(1, c).squeeze(1)).unsqueeze(1))
        closer = worth & (far < distance)  # false where there is no gradient: a distance of inf or nan
        distance, place = torch.where(closer, far, distance), torch.where(closer, c.squeeze(1), place)
        best = torch.where(per_row(closer, w), w, best)
        visited += worth
    assert best is not None
    return Nearest(distance, best, place, steep, norm, visited)


def _worth(distance: Tensor, gap: Tensor, norm: Tensor, c: Tensor, spread: Tensor | float) -> Tensor:
    """Could class ``c`` be a row's nearest, if its gradient were ``spread`` times as large as last seen? [B] bool."""
    seen = norm.gather(1, c).squeeze(1)
    steep = torch.where(seen > 0, spread * seen, SPREAD * norm.amax(1))
    return ~(gap.gather(1, c).squeeze(1) > steep * distance)


@dataclass
class Boundary(Rows):
    """The half-space <w, r> >= gap of changes r of the point ``x`` that was looked at: where the goal is met, linearised."""

    x: Tensor
    w: Tensor
    gap: Tensor

    def shortest(self, z: Tensor, region: Region, box: tuple[float, float]) -> Tensor:
        """The smallest change that takes ``z`` onto the boundary inside the box, from either side."""
        gain = self.gap - (self.w * (z - self.x)).flatten(1).sum(1)
        return region.shortest(torch.where(per_row(gain < 0, z), -self.w, self.w), gain.abs(), z, box)


@dataclass
class Rivals(Rows):
    """The classes whose boundaries come into question where a point walks along a boundary, as FAB's do.

    ``classes`` [B, c]; ``clean`` [B, c]: logits to each boundary at the first look; ``norm`` [B, c]: the dual norm of each
    gradient when last seen (0: not yet); ``visited`` [B]: how many were linearised last.
    """

    classes: Tensor
    clean: Tensor
    norm: Tensor
    visited: Tensor

    @classmethod
    def at(cls, problem: Problem, view: View, count: int) -> Rivals:
        """Before the first of them is linearised."""
        classes = candidates(problem, view, count)
        clean = _gaps(problem, view, *pairs(problem, view, classes))
        return cls(classes, clean, torch.zeros_like(clean), torch.zeros_like(clean[:, 0]))

    def nearest(self, problem: Problem, view: View, x: Tensor, visits: int) -> tuple[Boundary, Rivals]:
        """The boundary linearised at ``x``, the point of ``view``, that is nearest to the clean input; and what was learnt.

        The spread stays what it is: a point on a boundary has no way left with which it could shrink, as DeepFool's does.
        """
        region, away = problem.threat.region, problem.x0 - x
        pair = pairs(problem, view, self.classes)
        gaps = _gaps(problem, view, *pair)
        promise = torch.lerp(gaps, self.clean, BACK).abs()
        order = (promise / likely(self.norm)).argsort(dim=1, stable=True)

        def measure(c: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dual = region.dual(g)
            return g, dual, (gaps.gather(1, c).squeeze(1) - (g * away).flatten(1).sum(1)).abs() / dual

        live, visits = ~problem.found.settled, min(visits, gaps.shape[1])
        seen = find_nearest(view, pair, order, visits, promise, self.norm, SPREAD, measure, first=live, further=live)
        gap = gaps.gather(1, seen.place.unsqueeze(1)).squeeze(1).masked_fill(seen.distance.isinf(), 0.0)
        return Boundary(x, seen.w, gap), replace(self, norm=seen.norm, visited=seen.visited)


def _gaps(problem: Problem, view: View, raised: Tensor, lowered: Tensor) -> Tensor:
    """Logits to each candidate's boundary and just across, [B, c]; negative beyond it."""
    beyond = problem.goal.confidence + 2 * rounding(view.logits)
    gaps = view.logits.gather(1, lowered) - view.logits.gather(1, raised) + beyond.unsqueeze(1)
    return gaps.masked_fill(raised == lowered, math.inf).to(problem.x0.dtype)
