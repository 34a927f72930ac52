"""SuperDeepFool."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_least, check_share, check_whole
from mohs.attacks._smallest import nearest_rival, onto_boundary, towards
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access

GAIN = 1e-3
"""A smaller improvement, relative to the size, counts as none."""


@dataclass(kw_only=True)
class SuperDeepFoolState(State):
    """``rival`` [B]: class of nearest boundary at first; ``best`` [B]: smallest size so far; ``stale`` [B]: steps since it improved."""

    rival: Tensor
    best: Tensor
    stale: Tensor


@dataclass(frozen=True)
class SuperDeepFool:
    """The smallest change by DeepFool's steps to the boundary in turn with projections onto the boundary found.

        not across yet:  x_(k+1) = x_k + (1 + overshoot) * shortest step to the boundary linearised at x_k
        across:          x_(k+1) = x_k + damping * (p - x_k),  p the point nearest to x0 on the boundary linearised at x_k

    DeepFool stops where it first crosses; here the change is turned until it is orthogonal to the boundary, as the smallest
    one is. Far smaller changes than DeepFool's for a few times its passes; a row ends by itself. It fails where gradients
    are masked.

    Args:
        steps: linearisations at most.
        overshoot: how far beyond the linearised boundary, relative to the step.
        damping: share of the way to the projection, above 0; 1: all of it, as in the paper.
        candidates: classes of highest logit whose boundaries are measured at the first step; the nearest is walked to.
        patience: a row ends when so many steps in a row gained less than a thousandth.

    Cost: at most steps + 1 forwards, and a backward per step and per candidate at the first.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(SuperDeepFool(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 3)  # exactly 0.2 / sqrt(2)
    0.141

    **Differs from the paper**: it goes on after the first projection that is across, with damped ones, where the paper ends
    in a line search; projections count the margin left and stay inside the box exactly; the class of nearest boundary is
    chosen once, not at every step; all norms, through the smallest step of the region; targets.
    **Source**: A. Abdollahpoor, M. Abroshan, S.-M. Moosavi-Dezfooli, "Revisiting DeepFool: generalization and improvement",
    2023, arXiv:2303.12481, algorithms 2 and 3 (SDF(infinity, 1)).
    """

    steps: int = 100
    overshoot: float = 0.02
    damping: float = 0.3
    candidates: int = 10
    patience: int = 10
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    uneven: ClassVar[bool] = True
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l1", "l2", "lp", "linf")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "candidates", "patience")
        check_share(self, "damping")
        check_least(self, 0, "overshoot")

    def init(self, problem: Problem) -> SuperDeepFoolState:
        """At the clean input."""
        best = torch.full_like(problem.eps, math.inf)
        return SuperDeepFoolState(
            problem.begin(), rival=torch.full_like(problem.goal.label, -1), best=best, stale=torch.zeros_like(best)
        )

    def step(self, problem: Problem, state: SuperDeepFoolState, k: int) -> SuperDeepFoolState:
        """Across the boundary, or back along it."""
        x = state.x
        view = problem.linearize(x)
        rival = nearest_rival(problem, view, self.candidates) if k == 0 else state.rival
        value, w = towards(problem, view, rival)
        move = onto_boundary(problem, view, x, value, w).sub_(x)
        share = torch.where(view.met, self.damping, 1 + self.overshoot).to(x.dtype)
        moved = move.mul_(per_row(share, x)).add_(x).clamp_(*problem.threat.box)
        size = torch.where(view.met, problem.threat.region.measure(x, problem.x0), math.inf)
        better = size < state.best * (1 - GAIN)
        stale = torch.where(better | size.isinf() & state.best.isinf(), 0.0, state.stale + 1)
        best = torch.minimum(size, state.best)
        return SuperDeepFoolState(moved, (best == 0) | (stale >= self.patience), rival=rival, best=best, stale=stale)
