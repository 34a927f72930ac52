"""Which classes to aim at first: rankings of the classes other than the label, made at the clean inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mohs.attacks._rivals import contrast
from mohs.errors import UsageError
from mohs.problem import Problem
from mohs.regions import Lp

Ranking = Callable[[Problem, int], Tensor]
"""``rank(problem, count) -> classes [B, count]``, most promising first; it pays for its looks through the problem."""


def by_logit(problem: Problem, count: int) -> Tensor:
    """Highest logits first, [B, count]: one look.

    Raises:
        UsageError: more classes asked for than there are.
    """
    logits = problem.look(problem.x0).logits
    _enough(logits.shape[1], count)
    return _others(logits, problem.goal.label.unsqueeze(1))[:, :count]


def by_distance(problem: Problem, count: int, candidates: int = 10) -> Tensor:
    """Nearest linearised boundary first, [B, count]: one forward, a backward for each of the ``candidates`` highest logits.

    The distance to class c is (z_label - z_c) / ||grad (z_label - z_c)||_q with the region's dual norm q, as DeepFool's first step
    measures it; a class that has won already comes before all others, one without gradient last. Classes beyond the candidates
    are not considered. One gradient is held at a time: memory O(batch x inputs). In L0 the largest entry of the gradient
    stands for the dual norm.

    **Source**: O. Melamed, G. Yehudai, A. Shamir, "MALT powers up adversarial attacks", NeurIPS 2024, algorithm 1.

    Raises:
        UsageError: more classes asked for than there are.
    """
    view = problem.linearize(problem.x0)
    logits, label = view.logits, problem.goal.label.unsqueeze(1)
    _enough(logits.shape[1], count)
    ranked = _others(logits, label)
    tried = ranked[:, : min(max(count, candidates), logits.shape[1] - 1)]
    gap = logits.gather(1, label) - logits.gather(1, tried)
    region = problem.threat.region
    distance = torch.full_like(gap, math.inf)
    for j in range(tried.shape[1]):
        w = view.pull(contrast(view, tried[:, j : j + 1], label), keep=j < tried.shape[1] - 1)
        steep = region.dual(w) if isinstance(region, Lp) else w.abs().flatten(1).amax(1)
        distance[:, j] = torch.where(steep > 0, gap[:, j] / steep, math.inf)
    distance = torch.where(gap < 0, gap, distance)
    return tried.gather(1, distance.argsort(dim=1, stable=True))[:, :count]


def _others(logits: Tensor, label: Tensor) -> Tensor:
    """Classes by falling logit, the label behind all others, masked ones (-inf) too."""
    finite = logits.clamp_min(torch.finfo(logits.dtype).min)
    return finite.scatter(1, label, -math.inf).argsort(dim=1, descending=True, stable=True)


def _enough(classes: int, count: int) -> None:
    if count > classes - 1:
        raise UsageError(f"aims={count}, but the model has {classes} classes, so at most {classes - 1} others.")
