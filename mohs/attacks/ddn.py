"""Decoupled direction and norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_positive, check_whole
from mohs.attacks._smallest import cosine, distance, nothing_left, reach, unit
from mohs.look import View
from mohs.objectives import Objective, cross_entropy, margin
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access


@dataclass(kw_only=True)
class DDNState(State):
    """``size`` [B]: length of the change that ``x`` was given; ``most`` [B]: the largest worth trying."""

    size: Tensor
    most: Tensor


@dataclass(frozen=True)
class DDN:
    """The smallest L2 change by turning its direction with the gradient and its length with success.

        d = (x_k - x0) + alpha_k * size_k * g / ||g||            g = grad ((1 - t) J + t margin)(x_k),  t = k / steps
        size_(k+1) = size_k * (1 - gamma_k) if x_k meets the goal, else size_k * (1 + gamma_k)
        x_(k+1) = clip(x0 + size_(k+1) * d / ||d||)

    A row hovers about the boundary and slides along it. One of the strongest L2 attacks at a hundred passes, on undefended
    and robust nets alike. It fails where gradients are masked: without one it has no direction.

    Args:
        steps: gradient steps.
        gamma: share by which the length changes at the first step; it falls to ``last_gamma`` along a cosine.
        last_gamma: at the last step.
        alpha: gradient step, relative to the current length; it falls to ``last_alpha`` along a cosine.
        last_alpha: at the last step.
        objective: what to climb at first; its weights of the classes change evenly to those of the logit margin.

    Cost: steps + 1 forwards and steps backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(DDN(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 3)  # exactly 0.2 / sqrt(2)
    0.141

    **Differs from the paper**: the first length is twice the distance to the linearised boundary instead of 1, and gradient
    steps are relative to the current length instead of to 1, so that the scale of inputs and gradients does not matter;
    gamma falls, which places the last points closer to the boundary; the objective, brought to the margin's scale,
    turns into the margin of logits, as only its gradient is normal to the boundary: that of cross-entropy weighs all
    classes, which chooses well among them but settles beside the nearest point; nothing is rounded to 256 levels; at a
    finite radius no change grows beyond it.
    **Source**: J. Rony, L. Hafemann, L. Oliveira, I. Ben Ayed, R. Sabourin, E. Granger, "Decoupling direction and norm for
    efficient gradient-based L2 adversarial attacks and defenses", CVPR 2019, algorithm 1.
    """

    steps: int = 100
    gamma: float = 0.05
    last_gamma: float = 0.01
    alpha: float = 0.25
    last_alpha: float = 0.01
    objective: Objective = cross_entropy
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_positive(self, "gamma", "last_gamma", "alpha", "last_alpha")

    def init(self, problem: Problem) -> DDNState:
        """At the clean input."""
        x = problem.begin()
        return DDNState(x, size=problem.threat.region.measure(x, problem.x0), most=reach(problem))

    def step(self, problem: Problem, state: DDNState, k: int) -> DDNState:
        """Turn towards the gradient, then lengthen or shorten."""
        x, size, most = state.x, state.size, state.most
        view = problem.linearize(x, self.objective)
        share = k / self.steps
        g = view.pull(self._weights(problem, view, share))
        gamma = cosine(self.gamma, self.last_gamma, share)
        grown = size * (1 + gamma)
        if k == 0:
            grown = size + 2 * distance(problem, view.margin, g)
        size = torch.where(view.met, size * (1 - gamma), torch.minimum(grown, most))
        turn = cosine(self.alpha, self.last_alpha, share) * size
        change = unit(g).mul_(per_row(turn, x)).add_(x).sub_(problem.x0)
        change = unit(change).mul_(per_row(size, x))
        return DDNState(
            change.add_(problem.x0).clamp_(*problem.threat.box), nothing_left(problem), size=size, most=most
        )

    @staticmethod
    def _weights(problem: Problem, view: View, share: float) -> Tensor:
        """[B, K]: what to climb, as weights of the logits: the objective's, and by ``share`` the margin's."""
        largest = view.cotangent.abs().amax(1, keepdim=True).clamp_min_(torch.finfo(view.cotangent.dtype).tiny)
        return (view.cotangent / largest).mul_(1 - share).add_(margin(view.logits, problem.goal)[1], alpha=share)
