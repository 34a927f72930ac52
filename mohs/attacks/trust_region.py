"""The trust-region attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_positive, check_whole
from mohs.attacks._smallest import distance, nearest_rival, nothing_left, onto_boundary, towards
from mohs.errors import UsageError
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access


@dataclass(kw_only=True)
class TrustRegionState(State):
    """``rival`` [B]: class of nearest boundary at first; ``radius`` [B]: how far the linear model is trusted; ``value`` [B]:
    margin at the last point; ``expected`` [B]: the gain that the model promised there."""

    rival: Tensor
    radius: Tensor
    value: Tensor
    expected: Tensor


@dataclass(frozen=True)
class TrustRegion:
    """The smallest change by steps as long as the linear model of the margin can be trusted.

        p = the point of the boundary linearised at x_k nearest to x_k, or, once across, nearest to x0
        x_(k+1) = x_k + min(1, radius_k / ||p - x_k||) (p - x_k)
        quality = (margin(x_k) - margin(x_(k-1))) / (what the model promised)
        radius *= factor where the quality is within ``good`` of 1, radius /= factor where it is not within ``bad``

    Short steps follow a curved landscape to a nearer boundary than DeepFool's long ones, at more passes. It fails where
    gradients are masked.

    Args:
        steps: gradient steps.
        radius: of the first trust region, relative to the distance of the boundary linearised at the clean input.
        factor: by which a radius grows and shrinks, above 1.
        good: error of the promised gain, as a share of it, up to which the radius grows.
        bad: from which on it shrinks.
        candidates: classes of highest logit whose boundaries are measured at the first step; the nearest is walked to.

    Cost: steps + 1 forwards, and a backward per step and per candidate at the first.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(TrustRegion(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 3)  # exactly 0.2 / sqrt(2)
    0.141

    **Differs from the paper**: radii are relative to the distance of the boundary, without absolute bounds; a gain far above
    the promise is as untrustworthy as one far below; it goes on once across, towards the clean input, where the paper stops;
    each gain is judged by the forward of the next gradient; all norms; targets.
    **Source**: Z. Yao, A. Gholami, P. Xu, K. Keutzer, M. Mahoney, "Trust region based adversarial attack on neural
    networks", CVPR 2019, algorithm 1 and section 3 (adaptive).
    """

    steps: int = 100
    radius: float = 1.0
    factor: float = 1.2
    good: float = 0.1
    bad: float = 0.5
    candidates: int = 9
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l1", "l2", "lp", "linf")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "candidates")
        check_positive(self, "radius", "good", "bad")
        if not 1 < self.factor < math.inf:
            raise UsageError(f"TrustRegion's factor must be above 1; got {self.factor!r}.")

    def init(self, problem: Problem) -> TrustRegionState:
        """At the clean input."""
        zero = torch.zeros_like(problem.eps)
        return TrustRegionState(
            problem.begin(),
            rival=torch.full_like(problem.goal.label, -1),
            radius=zero,
            value=zero.clone(),
            expected=zero.clone(),
        )

    def step(self, problem: Problem, state: TrustRegionState, k: int) -> TrustRegionState:
        """Judge the last step, then take the next."""
        x, region = state.x, problem.threat.region
        view = problem.linearize(x)
        rival = nearest_rival(problem, view, self.candidates) if k == 0 else state.rival
        value, w = towards(problem, view, rival)
        if k == 0:
            radius = self.radius * distance(problem, value, w)
        else:
            error = ((value - state.value) / state.expected - 1).abs()
            radius = torch.where(error < self.good, state.radius * self.factor, state.radius)
            radius = torch.where(error > self.bad, state.radius / self.factor, radius)
        move = onto_boundary(problem, view, x, value, w).sub_(x)
        wanted = region.measure(move, torch.zeros_like(move))
        share = torch.where(wanted > radius, radius / wanted, 1.0)
        move = move.mul_(per_row(share, x))
        expected = (w * move).flatten(1).sum(1)
        x = move.add_(x).clamp_(*problem.threat.box)
        return TrustRegionState(x, nothing_left(problem), rival=rival, radius=radius, value=value, expected=expected)
