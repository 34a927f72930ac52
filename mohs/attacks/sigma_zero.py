"""Sigma-zero: gradient descent on a smooth count of the changed positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_share, check_whole
from mohs.attacks._sparse import geometry, least, tighten, unit
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.target import View
from mohs.threat import Access

DESCENT = 100
"""Steps that thin a point out, which the descent has for itself. Of those beyond, a search on fewer positions gets a quarter. With
fewer than half as many nothing gets thin, and the search gets half of them."""


@dataclass(kw_only=True)
class SigmaZeroState(State):
    """``mean`` and ``square`` [B, ...]: Adam's moments of the gradient (the mean is later that of ``tighten``);
    ``threshold`` [B]: smaller changes are undone, as a share of the box width."""

    mean: Tensor
    square: Tensor
    threshold: Tensor


@dataclass(frozen=True)
class SigmaZero:
    """Few changed positions by gradient descent on a smooth count of them, with a threshold that adapts to success.

    With d the change in box widths, c_i the squared change of position i and t a threshold per row:

        g = grad( -margin / max|grad margin| [not met] + mean_i c_i / (c_i + smoothing) )
        d = clip(d - rate_k * Adam(g / max|g|))
        t = t + pace * rate_k  where met, else  t - pace * rate_k
        d_i = 0  where  |d_i| < t

    The rate falls from ``step_size`` to a tenth of it along a cosine. It starts dense and thins out, so it seldom fails and
    needs no starting point. The last ``polish`` looks (a quarter of the steps beyond a hundred at most, or half of fewer than
    fifty) leave the descent: from the best point, on n positions, they look for one on n - 1, each position at the bound and
    all of them chosen afresh by an averaged gradient. The first choice for the fewest positions; it needs a finite box and
    fails where gradients are masked.

    Args:
        steps: looks with a gradient.
        step_size: first step of Adam, in box widths.
        smoothing: squared change at which a position counts half, in squared box widths.
        threshold: first threshold, in box widths.
        pace: how fast the threshold moves, in steps of Adam.
        polish: at most that many last looks search on fewer positions; 0: the paper's algorithm.

    Cost: at most steps + 1 forwards and steps backwards. A row ends where one position suffices.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0]]))
    >>> out = mohs.attack(SigmaZero(steps=20), net, torch.tensor([[0.9, 0.4, 0.5]]), torch.tensor([0]), "l0:inf")
    >>> bool(out.success), float(out.size)
    (True, 1.0)

    **Differs from the paper**: the margin's gradient is scaled to largest magnitude 1, so that logits of any scale are weighed
    alike against the count; lengths are in box widths; positions with several channels count once, by their squared sum, and
    are undone by their largest channel; the polish; targeted, where one library climbs the wrong way.
    **Source**: A. E. Cina, F. Villani, M. Pintor, L. Schoenherr, B. Biggio, M. Pelillo, "Sigma-zero: gradient-based
    optimization of l0-norm adversarial examples", ICLR 2025 (arXiv 2402.01879), algorithm 1, equations 3 to 6.
    """

    steps: int = 1000
    step_size: float = 1.0
    smoothing: float = 1e-3
    threshold: float = 0.3
    pace: float = 0.01
    polish: int = 60
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l0",)

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_whole(self, "polish", least=0)
        check_share(self, "step_size", "smoothing", "threshold", "pace")

    def init(self, problem: Problem) -> SigmaZeroState:
        """At the clean input."""
        geometry(problem)
        x = problem.begin()
        threshold = torch.full_like(problem.eps, self.threshold)
        return SigmaZeroState(x=x, mean=torch.zeros_like(x), square=torch.zeros_like(x), threshold=threshold)

    def step(self, problem: Problem, state: SigmaZeroState, k: int) -> SigmaZeroState:
        """One step of Adam and the threshold; towards the end, a try on fewer positions."""
        view = problem.linearize(state.x, margin)
        g = view.gradient()
        few = 2 * self.steps < DESCENT
        descent = self.steps - min(self.polish, self.steps // 2 if few else max(self.steps - DESCENT, 0) // 4)
        if k < descent:
            state = self._descend(problem, state, view, g, k, descent)
        else:
            x, mean = tighten(problem, g, state.mean)
            state = replace(state, x=x, mean=mean)
        if k == descent - 1:  # the polish begins at the best point
            x = torch.where(per_row(problem.found.met, state.x), problem.found.x, state.x)
            state = replace(state, x=x, mean=torch.zeros_like(x))
        return replace(state, done=least(problem))

    def _descend(
        self, problem: Problem, state: SigmaZeroState, view: View, g: Tensor, k: int, steps: int
    ) -> SigmaZeroState:
        """Algorithm 1, lines 3 to 10."""
        region, width = geometry(problem)
        x, x0 = state.x, problem.x0
        change = (x - x0).div_(width)
        groups = region.positions(change)
        count = groups.square().sum(1, keepdim=True).add_(self.smoothing)
        slope = (groups * (2 * self.smoothing / groups.shape[2]) / count.square()).view_as(x)
        g = unit(slope - unit(g).masked_fill_(per_row(view.met, g), 0.0))

        mean = (state.mean * 0.9).add_(0.1 * g)
        square = (state.square * 0.999).add_(0.001 * g * g)
        rate = _cosine(self.step_size, max(k - 1, 0), steps)
        spread = square.sqrt().div_(math.sqrt(1 - 0.999 ** (k + 1))).add_(1e-8)
        change -= (mean / spread).mul_(rate / (1 - 0.9 ** (k + 1)))
        moved = change.mul_(width).add_(x0).clamp_(*problem.threat.box)

        shift = self.pace * _cosine(self.step_size, k, steps)
        threshold = torch.where(view.met, state.threshold + shift, state.threshold - shift).clamp_(0.0, 1.0)
        groups = region.positions((moved - x0).abs_().div_(width))
        kept = (groups >= threshold.view(-1, 1, 1)).any(1, keepdim=True)
        x = torch.where(kept, region.positions(moved), region.positions(x0)).view_as(x0)
        return SigmaZeroState(x=x, mean=mean, square=square, threshold=threshold)


def _cosine(rate: float, k: int, steps: int) -> float:
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * k / steps)))
