"""The fast minimum-norm attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_positive, check_whole
from mohs.attacks._smallest import cosine, distance, free, nothing_left, reach, unit
from mohs.attacks._sparse import geometry
from mohs.look import View
from mohs.problem import Problem
from mohs.regions import L0, L1, Lp, per_row
from mohs.threat import Access


@dataclass(kw_only=True)
class FMNState(State):
    """``size`` [B]: radius of the ball that ``x`` was projected to; ``most`` [B]: the largest worth trying."""

    size: Tensor
    most: Tensor


@dataclass(frozen=True)
class FMN:
    """The smallest change by projected gradient steps in a ball that shrinks with success and grows without.

        size_(k+1) = min(size_k * (1 - gamma_k), best)              if x_k meets the goal
                     size_k * (1 + gamma_k)                         if an earlier point did
                     ||x_k - x0|| + 2 |margin| / ||g||_q            otherwise, g = grad margin(x_k)
        x_(k+1) = project(x_k + alpha_k * length(size_(k+1)) * g / ||g||_2, size_(k+1))

    ``length`` is the Euclidean size of a change that fills the ball evenly, size * D^(1/2 - 1/p); in L1, where changes are
    sparse, the geometric mean of that and of the length of x_k - x0, brought to this size. In L0, where sizes are counts
    and move by at least one, it is the width of the box for each of ten times as many positions. Quick, simple and strong
    in every norm; start here. It fails where gradients are masked, and in L0 it needs luck with the first coordinates and
    a finite box.

    Args:
        steps: gradient steps.
        gamma: share by which the radius changes at the first step; it falls to ``last_gamma`` along a cosine.
        last_gamma: at the last step.
        alpha: gradient step, relative to the ball; it falls to ``last_alpha`` along a cosine.
        last_alpha: at the last step.

    Cost: steps + 1 forwards and steps backwards; L1 sorts the coordinates at each step.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(FMN(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "linf:inf")
    >>> round(float(out.size), 3)  # exactly 0.1
    0.1

    **Differs from the paper**: until the boundary is crossed, the step goes twice as far as the linearised distance; gradient
    steps are relative to the ball instead of to 1, so that the scale of inputs does not matter; coordinates that the box
    holds back take no part in gradient and distance; the box is part of the projection (L0, L1, Linf: exactly); L0 counts
    positions; at a finite radius no change grows beyond it.
    **Source**: M. Pintor, F. Roli, W. Brendel, B. Biggio, "Fast minimum-norm adversarial attacks through adaptive norm
    constraints", NeurIPS 2021, algorithm 1.
    """

    steps: int = 100
    gamma: float = 0.05
    last_gamma: float = 0.001
    alpha: float = 1.0
    last_alpha: float = 0.01
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l0", "l1", "l2", "linf")

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_positive(self, "gamma", "last_gamma", "alpha", "last_alpha")

    def init(self, problem: Problem) -> FMNState:
        """At the clean input."""
        if isinstance(problem.threat.region, L0):
            geometry(problem)  # refuses a box without a width
        x = problem.begin()
        return FMNState(x, size=problem.threat.region.measure(x, problem.x0), most=reach(problem))

    def step(self, problem: Problem, state: FMNState, k: int) -> FMNState:
        """Resize the ball, step along the gradient, project."""
        x, x0, region, box = state.x, problem.x0, problem.threat.region, problem.threat.box
        view = problem.linearize(x)
        g = free(view.gradient(), x, box)
        share = k / self.steps
        size = self._resize(problem, state, view, g, cosine(self.gamma, self.last_gamma, share))
        length = self._length(problem, x, size)
        moved = unit(g).mul_(per_row(cosine(self.alpha, self.last_alpha, share) * length, x)).add_(x)
        return FMNState(region.project(moved, x0, size, box), nothing_left(problem), size=size, most=state.most)

    @staticmethod
    def _length(problem: Problem, x: Tensor, size: Tensor) -> Tensor:
        """[B]: Euclidean length of a change that is typical for a ball of this size."""
        region, (low, high) = problem.threat.region, problem.threat.box
        if not isinstance(region, Lp):
            return (high - low) * (10 * size).sqrt()
        even = size * x[0].numel() ** (0.5 - 1 / region.p)
        if not isinstance(region, L1):
            return even
        # a change of few coordinates is far longer than an even one: shorter steps do not sort them out, as long ones overshoot
        held = region.measure(x, problem.x0)
        own = torch.linalg.vector_norm((x - problem.x0).flatten(1), dim=1) / held.clamp_min(torch.finfo(x.dtype).tiny)
        return torch.where(held > 0, (size * own * even).sqrt(), even)

    @staticmethod
    def _resize(problem: Problem, state: FMNState, view: View, g: Tensor, gamma: float) -> Tensor:
        """[B]: the radius of the next ball."""
        size, region, found = state.size, problem.threat.region, problem.found
        best = torch.where(found.met, -found.score, state.most) if problem.threat.minimum else state.most
        if isinstance(region, L0):
            smaller = torch.minimum(size - 1, (size * (1 - gamma)).floor())
            larger = torch.maximum(size + 1, (size * (1 + gamma)).floor())
        else:
            ahead = region.measure(state.x, problem.x0) + 2 * distance(problem, view.margin, g)
            smaller = size * (1 - gamma)
            larger = torch.where(found.met, size * (1 + gamma), ahead)
        return torch.where(view.met, torch.minimum(smaller, best), larger).clamp_min_(0.0).minimum(state.most)
