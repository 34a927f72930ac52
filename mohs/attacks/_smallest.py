"""What the searches for the smallest change share: how far to begin, how far to go at most, and when nothing is left to gain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mohs.attacks._rivals import candidates, contrast, pairs
from mohs.look import View
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.target import rounding


def reach(problem: Problem) -> Tensor:
    """[B]: the largest size worth trying, the row's radius or the way to the farthest corner of the box."""
    x0, (low, high) = problem.x0, problem.threat.box
    corner = torch.where(x0 - low > high - x0, low, high)
    return torch.minimum(problem.threat.region.measure(corner, x0), problem.eps)


def distance(problem: Problem, gap: Tensor, g: Tensor) -> Tensor:
    """[B]: how far away the linearised boundary is, |gap| over the dual norm of the margin's gradient; 0 without a gradient."""
    dual = problem.threat.region.dual(g)
    far = gap.abs() / dual
    return torch.where((dual > 0) & far.isfinite(), far, 0.0)


def free(g: Tensor, x: Tensor, box: tuple[float, float]) -> Tensor:
    """The gradient without the coordinates that the box does not let follow it."""
    if math.isinf(box[0]) and math.isinf(box[1]):
        return g
    return g * (((x < box[1]) | (g <= 0)) & ((x > box[0]) | (g >= 0)))  # masked_fill takes several times as long


def unit(g: Tensor) -> Tensor:
    """Each row over its Euclidean norm; zero for zero."""
    scaled = g / per_row(g.abs().flatten(1).amax(1).clamp_min_(torch.finfo(g.dtype).tiny), g)
    return scaled.div_(per_row(torch.linalg.vector_norm(scaled.flatten(1), dim=1).clamp_min_(0.5), g))


def nearest_rival(problem: Problem, view: View, count: int) -> Tensor:
    """[B]: of the ``count`` highest other logits the class of nearest linearised boundary; a backward for each.

    Rows with a class to reach or to aim at have no choice: -1, as for rows without a gradient.
    """
    goal, logits = problem.goal, view.logits
    rival, least = torch.full_like(goal.label, -1), torch.full_like(problem.eps, math.inf)
    if bool((goal.reach | (goal.aim >= 0)).any()):
        return rival
    raised, lowered = pairs(problem, view, candidates(problem, view, count))
    for up, down in zip(raised.split(1, dim=1), lowered.split(1, dim=1), strict=True):
        dual = problem.threat.region.dual(view.pull(contrast(view, up, down), keep=True))
        gap = (logits.gather(1, down) - logits.gather(1, up)).squeeze(1)
        near = torch.where(gap < 0, gap, gap / dual)  # a class that has won comes first
        closer = (near < least) & (up != down).squeeze(1)
        rival, least = torch.where(closer, up.squeeze(1), rival), torch.where(closer, near, least)
    return rival


def towards(problem: Problem, view: View, rival: Tensor) -> tuple[Tensor, Tensor]:
    """(margin, its gradient): of ``rival`` [B] until a row first met its goal, else (or at -1) of the strongest rival."""
    raised, lowered = problem.goal.contest(view.logits)
    raised = torch.where((rival >= 0) & ~problem.found.met & ~view.met, rival, raised).unsqueeze(1)
    lowered = lowered.unsqueeze(1)
    value = (view.logits.gather(1, raised) - view.logits.gather(1, lowered)).squeeze(1)
    return value - problem.goal.confidence, view.pull(contrast(view, raised, lowered))


def onto_boundary(problem: Problem, view: View, x: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """The point of the linearised boundary in the box that is nearest to ``x``, or, once across, nearest to the clean input.

    The boundary is {z: value + <w, z - x> = 0}, and just beyond the rounding of the logits, and of the point: a step that is lost
    in the digits of x would be asked for again for ever.
    """
    base = torch.where(per_row(view.met, x), problem.x0, x)
    digits = 2 * torch.finfo(x.dtype).eps * (w * x).abs().flatten(1).sum(1)
    gap = 2 * rounding(view.logits) + digits - value + (w * (x - base)).flatten(1).sum(1)
    return problem.threat.region.shortest(w, gap, base, problem.threat.box).add_(base)


def nothing_left(problem: Problem) -> Tensor | None:
    """[B]: rows whose clean input meets the goal, where the smallest change is asked for."""
    return problem.found.met & (problem.found.score >= 0) if problem.threat.minimum else None


def cosine(first: float, last: float, share: float) -> float:
    """From ``first`` to ``last`` along half a cosine, at ``share`` of the way."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
