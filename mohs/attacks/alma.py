"""The augmented Lagrangian method for adversarial examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks import _primal_dual as pd
from mohs.attacks._base import State
from mohs.attacks._settings import check_positive, check_whole
from mohs.attacks._smallest import distance, nothing_left, unit
from mohs.errors import UsageError
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access

FAR = 1e3
"""Bound of the constraint, in distances of the clean input: beyond it the penalty's square would run out of floats."""


@dataclass(kw_only=True)
class ALMAState(State):
    """``momentum``, ``square`` [B, ...]: of RMSProp; ``weight``, ``rho`` [B]: multiplier and penalty; ``scale`` [B]: distance
    of the boundary at first; ``pace`` [B]: step at first; ``checked`` [B]: constraint at the last check; ``since`` [B]: step at
    which the goal was met first."""

    momentum: Tensor
    square: Tensor
    weight: Tensor
    rho: Tensor
    scale: Tensor
    pace: Tensor
    checked: Tensor
    since: Tensor


@dataclass(frozen=True)
class ALMA:
    """The smallest change by gradient descent on an augmented Lagrangian whose multiplier follows the constraint.

        y = -margin(x_k) / (||grad margin||_q * scale)                   positive: not there yet
        every ``check`` steps: rho *= gamma unless the goal was met or y fell below tau times its last value
        weight = alpha * weight + (1 - alpha) * P'(y, rho, weight)
        x_(k+1) = clip(x_k - pace_k * RMSProp(grad ||x_k - x0|| + P'(y, rho, weight) * grad y))
        P' = weight (1 + 2 rho y) + (rho y)^2 / 2 where y >= 0, else weight / (1 - rho y)^2

    Made for any differentiable distance; here L1 and L2. It needs several hundred passes, and finds no exact zeros: for L1
    ``PDPGD`` is stronger. It fails where gradients are masked.

    Args:
        steps: gradient steps.
        step_size: first step, relative to the distance of the linearised boundary per coordinate.
        last_step: last step, relative to the first; it fades geometrically from the row's first success on.
        alpha: weight of the past in all three averages: multiplier, momentum, squares.
        check: steps between two looks at the progress of the constraint.
        tau: factor by which the constraint must have fallen meanwhile.
        gamma: factor by which the penalty rises if it has not.

    Cost: steps + 1 forwards and steps backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(ALMA(steps=200), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 2)  # exactly 0.2 / sqrt(2)
    0.14

    **Differs from the paper**: the constraint is the linearised distance to the boundary over that at the clean input,
    instead of the difference of logits ratio: free of scale as well, and defined for two classes; squares begin at the
    first gradient's mean instead of at 1; the first step follows from the distance.
    **Source**: J. Rony, E. Granger, M. Pedersoli, I. Ben Ayed, "Augmented Lagrangian adversarial attacks", ICCV 2021,
    algorithm 1 with the penalty P2.
    """

    steps: int = 1000
    step_size: float = 1.0
    last_step: float = 0.01
    alpha: float = 0.9
    check: int = 10
    tau: float = 0.95
    gamma: float = 1.2
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l1", "l2")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "check")
        check_positive(self, "step_size", "last_step", "tau", "gamma")
        if not 0 <= self.alpha < 1:
            raise UsageError(f"ALMA's alpha must be at least 0 and below 1; got {self.alpha!r}.")

    def init(self, problem: Problem) -> ALMAState:
        """At the clean input, multiplier and penalty 1."""
        x = problem.begin()
        one, zero = torch.ones_like(problem.eps), torch.zeros_like(problem.eps)
        return ALMAState(
            x, momentum=torch.zeros_like(x), square=torch.zeros_like(x), weight=one, rho=one.clone(), scale=zero,
            pace=zero.clone(), checked=zero.clone(), since=torch.full_like(one, float(self.steps)),
        )  # fmt: skip

    def step(self, problem: Problem, state: ALMAState, k: int) -> ALMAState:
        """Constraint, penalty, multiplier; then one step of RMSProp."""
        x, region = state.x, problem.threat.region
        view = problem.linearize(x)
        g = view.gradient()
        tiny = torch.finfo(x.dtype).tiny
        dual = region.dual(g).clamp_min_(tiny)
        away = -view.value.sign() * distance(problem, view.value, g)
        scale, pace = state.scale, state.pace
        if k == 0:
            scale, pace = away.abs().clamp_min_(tiny), self.step_size * pd.pace(problem, view, g)
        y = (away / scale).clamp_(-FAR, FAR)

        rho, weight, checked = state.rho, state.weight, y if k == 0 else state.checked
        if k and (k + 1) % self.check == 0:
            rho = torch.where(problem.found.met | (y < self.tau * checked), rho, rho * self.gamma)
            checked = y
        if k:
            weight = weight * self.alpha + slope(y, rho, weight) * (1 - self.alpha)
            weight = weight.clamp_(1e-6, 1e12)

        ascent = g * per_row(slope(y, rho, weight) / dual, x)
        change = x - problem.x0
        ascent -= unit(change) if region.kind == "l2" else change.sign()
        square = ascent.square()
        if k == 0:
            square = square.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1)).expand_as(x).contiguous()
        else:
            square = state.square * self.alpha + square.mul_(1 - self.alpha)
        momentum = state.momentum * self.alpha + ascent.div_(square.sqrt().add_(1e-8)).mul_(1 - self.alpha)
        since = torch.where(problem.found.met, state.since.clamp_max(k), state.since)
        length = pace * pd.faded(self.steps, k, since, self.last_step)
        x = problem.project(x + momentum * per_row(length, x))
        return ALMAState(
            x, nothing_left(problem), momentum=momentum, square=square, weight=weight, rho=rho, scale=scale, pace=pace,
            checked=checked, since=since,
        )  # fmt: skip


def slope(y: Tensor, rho: Tensor, weight: Tensor) -> Tensor:
    """Derivative of the penalty P2 with respect to the constraint, [B]."""
    deep = weight * (1 + 2 * rho * y) + (rho * y).square() / 2
    return torch.where(y >= 0, deep, weight / (1 - rho * y.clamp_max(0.0)).square())
