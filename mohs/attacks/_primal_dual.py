"""What PDGD and PDPGD share: a constraint in input units, Adam per row, and the dual variable.

The margin and its gradient are divided by the gradient's dual norm. The constraint then counts the linearised distance to the
boundary in input units, and the best multiplier is known: the gradient of a norm has dual norm 1, so at the smallest change
the two weights are equal. What the paper sets in units of logits becomes a constant for every net.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.look import View
from mohs.problem import Problem
from mohs.regions import per_row

FIRST, SECOND = 0.9, 0.999
"""Adam's decay rates of the two moments."""

SOFT = 5.0
"""Logits of the clean margin, for the softplus: a row counts as deep in its class there, whatever the scale of its logits."""

RATIO = 1e-6
"""The two weights never differ by more than this factor."""


@dataclass(kw_only=True)
class PrimalDualState(State):
    """``first``, ``second`` [B, ...]: Adam's moments; ``dual`` [B]: log of constraint weight over norm weight, ``weight`` [B]:
    the constraint's share, averaged; ``pace`` [B]: Adam's step at first, input units; ``scale`` [B]: clean margin, logits;
    ``since`` [B]: step at which the goal was met first."""

    first: Tensor
    second: Tensor
    dual: Tensor
    weight: Tensor
    pace: Tensor
    scale: Tensor
    since: Tensor


def begin(problem: Problem, steps: int, ratio: float) -> PrimalDualState:
    """All weight but ``ratio`` on the constraint."""
    x = problem.begin()
    dual = torch.full_like(problem.eps, -math.log(ratio))
    zero = torch.zeros_like(dual)
    since = torch.full_like(dual, float(steps))
    return PrimalDualState(
        x, first=torch.zeros_like(x), second=torch.zeros_like(x), dual=dual, weight=share(dual), pace=zero,
        scale=zero.clone(), since=since,
    )  # fmt: skip


def share(dual: Tensor) -> Tensor:
    """The constraint's share of the two weights: the softmax of (0, dual)."""
    return torch.sigmoid(dual.double()).to(dual.dtype)  # in float32 its last bit depends on the place in the batch


def constraint(problem: Problem, view: View, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(descent direction of softplus(-margin) [B, ...], plain gradient of the margin), the former over its dual norm."""
    g = view.gradient()
    dual = problem.threat.region.dual(g).clamp_min_(torch.finfo(g.dtype).tiny)
    deep = share(-SOFT * view.value / scale)
    return g * per_row(deep / dual, g), g


def pace(problem: Problem, view: View, g: Tensor) -> Tensor:
    """Adam's first step: between the boundary's distance in Linf, for many coordinates, and in L1, for few of them."""
    flat = g.abs().flatten(1)
    slope = (flat.amax(1).double() * flat.sum(1).double()).sqrt().to(g.dtype)
    far = view.value.abs() / slope
    low, high = problem.threat.box
    return torch.where((slope > 0) & far.isfinite(), far, 0.0).clamp_max_(high - low)


def adam(state: PrimalDualState, g: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(first moment, second moment, ascent direction, its metric: the corrected root of the second moment)."""
    first = state.first * FIRST + g * (1 - FIRST)
    second = state.second * SECOND + g.square().mul_(1 - SECOND)
    metric = second.div(1 - SECOND ** (k + 1)).sqrt_().add_(1e-8)
    return first, second, first.div(1 - FIRST ** (k + 1)).div_(metric), metric


def faded(steps: int, k: int, since: Tensor, last: float) -> Tensor:
    """[B]: from 1 at the first success to ``last`` at the end, geometrically."""
    age = (k - since).clamp_min_(0.0) / (steps - since).clamp_min_(1.0)
    return age.double().mul_(math.log(last)).exp_().to(since.dtype)


def dual_step(state: PrimalDualState, met: Tensor, k: int, steps: int, size: float) -> tuple[Tensor, Tensor]:
    """(log ratio, averaged share of the constraint): less of it where the goal is met, more elsewhere; steps fall tenfold."""
    left = (steps - 1 - k) / max(steps - 1, 1)
    moved = max(size, 10 / steps) * (0.1 + 0.9 * left)  # few steps must be able to undo the first ratio too
    bound = -math.log(RATIO)
    dual = torch.where(met, state.dual - moved, state.dual + moved).clamp_(-bound, bound)
    return dual, state.weight * 0.9 + share(dual) * 0.1
