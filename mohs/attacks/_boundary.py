"""The linearised decision boundary of each row that is nearest to its clean input: what FAB walks along."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mohs._rows import Rows
from mohs.problem import Problem
from mohs.regions import Region, per_row
from mohs.target import View, rounding

SPREAD = 4.0
"""By how much the gradients of a row's classes may differ: what would be farther away even so is not linearised."""


BACK = 0.1
"""How far back towards the clean input the classes are compared: on a boundary its own class would always be the nearest."""


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
    """The classes whose boundaries come into question.

    ``classes`` [B, c]; ``clean`` [B, c]: logits to each boundary at the first look; ``norm`` [B, c]: the dual norm of each
    gradient when last seen (0: not yet); ``visited`` [B]: how many were linearised last.
    """

    classes: Tensor
    clean: Tensor
    norm: Tensor
    visited: Tensor

    @classmethod
    def at(cls, problem: Problem, view: View, count: int) -> Rivals:
        """Those of highest logit; one of them where the rows have a class to reach or to aim at."""
        goal, logits = problem.goal, view.logits
        if bool((goal.reach | (goal.aim >= 0)).any()):
            raised, lowered = goal.contest(logits)
            classes = torch.where(goal.reach, lowered, raised).unsqueeze(1)
        else:
            others = logits.scatter(1, goal.label.unsqueeze(1), -math.inf)
            classes = others.topk(min(count, logits.shape[1] - 1), dim=1).indices
        clean = _gaps(problem, view, *_pairs(problem, view, classes))
        return cls(classes, clean, torch.zeros_like(clean), torch.zeros_like(clean[:, 0]))

    def nearest(self, problem: Problem, view: View, x: Tensor, visits: int) -> tuple[Boundary, Rivals]:
        """The boundary linearised at ``x``, the point of ``view``, that is nearest to the clean input; and what was learnt.

        The ``visits`` classes that promise to be the nearest are linearised, and of these only those that would be it if
        their gradient were ``SPREAD`` times as large as last seen: one backward each, memory O(batch x inputs).
        """
        region, away = problem.threat.region, problem.x0 - x
        raised, lowered = _pairs(problem, view, self.classes)
        gaps = _gaps(problem, view, raised, lowered)
        promise = torch.lerp(gaps, self.clean, BACK).abs()
        order = (promise / _likely(self.norm)).argsort(dim=1, stable=True)
        live, distance = ~problem.found.settled, torch.full_like(gaps[:, 0], math.inf)
        w, gap, norm = torch.zeros_like(x), torch.zeros_like(distance), self.norm
        visits, visited = min(visits, gaps.shape[1]), torch.zeros_like(distance)
        for j in range(visits):
            c = order[:, j : j + 1]
            if j == 0:
                worth = live
            else:
                worth = worth & ~(
                    promise.gather(1, c) > SPREAD * _likely(norm).gather(1, c) * distance.unsqueeze(1)
                ).squeeze(1)
                if not bool(worth.any()):
                    break  # and so for all that follow
            cotangent = torch.zeros_like(view.logits)
            cotangent.scatter_(1, raised.gather(1, c), 1.0).scatter_(1, lowered.gather(1, c), -1.0)
            g = view.pull(cotangent, keep=j < visits - 1, rows=worth)
            dual, here = region.dual(g), gaps.gather(1, c).squeeze(1)
            far = (here - (g * away).flatten(1).sum(1)).abs() / dual
            closer = worth & (far < distance)  # false where there is no gradient: a distance of inf or nan
            # a row keeps to its own rule: what its batch mates still want to see must not change it
            norm = norm.scatter(1, c, torch.where(worth, dual, norm.gather(1, c).squeeze(1)).unsqueeze(1))
            distance, gap = torch.where(closer, far, distance), torch.where(closer, here, gap)
            w = torch.where(per_row(closer, x), g, w)
            visited += worth
        return Boundary(x, w, gap), replace(self, norm=norm, visited=visited)


def _likely(norm: Tensor) -> Tensor:
    """Gradient norms, that of a class never seen like the largest seen."""
    largest = norm.amax(1, keepdim=True).clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.where(norm > 0, norm, largest)


def _pairs(problem: Problem, view: View, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(class to raise, class to lower) for each candidate, [B, c] each."""
    goal = problem.goal
    if bool(goal.reach.any()):
        raised, lowered = goal.contest(view.logits)  # the strongest rival changes from step to step
        return raised.unsqueeze(1), lowered.unsqueeze(1)
    return classes, goal.label.unsqueeze(1).expand_as(classes)


def _gaps(problem: Problem, view: View, raised: Tensor, lowered: Tensor) -> Tensor:
    """Logits to each candidate's boundary and just across, [B, c]; negative beyond it."""
    beyond = problem.goal.confidence + 2 * rounding(view.logits)
    gaps = view.logits.gather(1, lowered) - view.logits.gather(1, raised) + beyond.unsqueeze(1)
    return gaps.masked_fill(raised == lowered, math.inf).to(problem.x0.dtype)
