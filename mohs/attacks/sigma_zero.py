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
from mohs.look import View
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access

PATIENCE = 10
"""Looks without a smaller success, of the last ones, after which a row leaves the descent (a tenth of the steps, if that is
less)."""


@dataclass(kw_only=True)
class SigmaZeroState(State):
    """``mean`` and ``square`` [B, ...]: Adam's moments of the gradient (the mean is later that of ``tighten``);
    ``threshold`` [B]: smaller changes are undone, as a share of the box width; ``best`` [B]: score of the best point so far,
    ``stale`` [B]: looks since it got better, -1 once the row has left the descent."""

    mean: Tensor
    square: Tensor
    threshold: Tensor
    best: Tensor
    stale: Tensor


@dataclass(frozen=True)
class SigmaZero:
    """Few changed positions by gradient descent on a smooth count of them, with a threshold that adapts to success.

    With d the change in box widths, c_i the squared change of position i and t a threshold per row:

        g = grad( -margin / max|grad margin| [not met] + mean_i c_i / (c_i + smoothing) )
        d = clip(d - rate_k * Adam(g / max|g|))
        t = t + pace * rate_k  where met, else  t - pace * rate_k
        d_i = 0  where  |d_i| < t

    The rate falls from ``step_size`` to a tenth of it along a cosine. It starts dense and thins out, so it seldom fails and
    needs no starting point. In the last ``polish`` looks (a quarter of the steps at most, or half of fewer than forty) a row
    whose success has got no smaller for ten looks leaves the descent: from its best point, on n positions, it looks for one on
    n - 1, each position at the bound and all of them chosen afresh by an averaged gradient. The first choice for the fewest
    positions; it needs a finite box and fails where gradients are masked.

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
        return SigmaZeroState(
            x=x, mean=torch.zeros_like(x), square=torch.zeros_like(x), threshold=threshold,
            best=torch.full_like(threshold, -math.inf), stale=torch.zeros_like(problem.goal.label),
        )  # fmt: skip

    def step(self, problem: Problem, state: SigmaZeroState, k: int) -> SigmaZeroState:
        """One step of Adam and the threshold; towards the end, a try on fewer positions."""
        view = problem.linearize(state.x, margin)
        g = view.gradient()
        after = self._descend(problem, state, view, g, k)
        if k >= self.steps - min(self.polish, self.steps // 4 if self.steps >= 4 * PATIENCE else self.steps // 2):
            after = self._tighten(problem, state, after, g)
        return replace(after, done=least(problem))

    def _tighten(self, problem: Problem, state: SigmaZeroState, after: SigmaZeroState, g: Tensor) -> SigmaZeroState:
        """Rows that have stopped to improve look for a point on fewer positions instead, beginning at their best one."""
        away = state.stale < 0
        leaves = ~away & (after.stale >= min(PATIENCE, self.steps // 10))
        begin, on = per_row(leaves, g), per_row(away | leaves, g)
        x, mean = tighten(problem, g, state.mean)
        first = torch.where(per_row(problem.found.met, g), problem.found.x, state.x)
        x, mean = torch.where(begin, first, x), mean.masked_fill_(begin, 0.0)
        return replace(
            after, x=torch.where(on, x, after.x), mean=torch.where(on, mean, after.mean),
            stale=after.stale.masked_fill(away | leaves, -1),
        )  # fmt: skip

    def _descend(self, problem: Problem, state: SigmaZeroState, view: View, g: Tensor, k: int) -> SigmaZeroState:
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
        rate = _cosine(self.step_size, max(k - 1, 0), self.steps)
        spread = square.sqrt().div_(math.sqrt(1 - 0.999 ** (k + 1))).add_(1e-8)
        change -= (mean / spread).mul_(rate / (1 - 0.9 ** (k + 1)))
        moved = change.mul_(width).add_(x0).clamp_(*problem.threat.box)

        shift = self.pace * _cosine(self.step_size, k, self.steps)
        threshold = torch.where(view.met, state.threshold + shift, state.threshold - shift).clamp_(0.0, 1.0)
        groups = region.positions((moved - x0).abs_().div_(width))
        kept = (groups >= threshold.view(-1, 1, 1)).any(1, keepdim=True)
        x = torch.where(kept, region.positions(moved), region.positions(x0)).view_as(x0)
        better = problem.found.score > state.best
        return SigmaZeroState(
            x=x, mean=mean, square=square, threshold=threshold, best=problem.found.score.clone(),
            stale=(state.stale + 1).masked_fill_(better, 0),
        )  # fmt: skip


def _cosine(rate: float, k: int, steps: int) -> float:
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * k / steps)))
