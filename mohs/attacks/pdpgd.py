"""Primal-dual proximal gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks import _primal_dual as pd
from mohs.attacks._primal_dual import PrimalDualState
from mohs.attacks._settings import check_positive, check_whole
from mohs.attacks._smallest import nothing_left
from mohs.problem import Problem
from mohs.regions import L1, Linf, per_row
from mohs.threat import Access


@dataclass(frozen=True)
class PDPGD:
    """The smallest change as a game: the point minimises norm and constraint, a dual variable sets their exchange rate.

        min over r, max over w:   (1 - w) ||r|| + w softplus(-margin(x0 + r))
        r' = r + pace_k * Adam(gradient of the constraint)
        r_(k+1) = clip(prox(r')),   prox(v) = argmin_z  pace_k (1 - w) / w ||z|| + sum_i h_i (z_i - v_i)^2 / 2
        log(w / (1 - w)) falls by dual_size where the goal is met and rises elsewhere

    h is Adam's metric. The proximal step gives exact zeros in L1 and exact plateaus in Linf. The strongest attack here for
    the smallest change in L1 and Linf, given some hundred passes. It fails where gradients are masked.

    Args:
        steps: gradient steps.
        step_size: Adam's first step, relative to the distance of the linearised boundary per coordinate.
        last_step: Adam's last step, relative to the first; it fades geometrically from the row's first success on.
        ratio: weight of the norm relative to that of the constraint, at the beginning.
        dual_size: step of the dual variable, and at least 10 / steps; it falls tenfold until the end.

    Cost: steps + 1 forwards and steps backwards; a sort per step in Linf.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(PDPGD(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "linf:inf")
    >>> round(float(out.size), 2)  # exactly 0.1
    0.1

    **Differs from the paper**: the constraint is divided by the dual norm of its gradient, so that weights and steps do not
    depend on the scale of inputs or logits; steps fade from the first success on, not from the first step; the proximal
    point in Adam's metric is exact in L1 (a threshold per coordinate) and Linf (one sort) where the paper iterates; no L0.
    **Source**: A. Matyasko, L.-P. Chau, "PDPGD: primal-dual proximal gradient descent adversarial attack", 2021,
    arXiv:2106.01538, algorithm 2; proximal Adam: J. Melchior et al., 2019, arXiv:1910.10094.
    """

    steps: int = 500
    step_size: float = 1.0
    last_step: float = 0.01
    ratio: float = 0.01
    dual_size: float = 0.1
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l1", "l2", "linf")

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_positive(self, "step_size", "last_step", "ratio", "dual_size")

    def init(self, problem: Problem) -> PrimalDualState:
        """At the clean input, with most of the weight on the constraint."""
        return pd.begin(problem, self.steps, self.ratio)

    def step(self, problem: Problem, state: PrimalDualState, k: int) -> PrimalDualState:
        """Climb the margin with Adam, then take the proximal point of the norm."""
        x, x0 = state.x, problem.x0
        view = problem.linearize(x)
        if k == 0:
            state = replace(state, scale=view.value.abs().clamp_min(torch.finfo(x.dtype).tiny))
        climb, g = pd.constraint(problem, view, state.scale)
        if k == 0:
            state = replace(state, pace=self.step_size * pd.pace(problem, view, g))
        since = torch.where(problem.found.met, state.since.clamp_max(k), state.since)
        pace = state.pace * pd.faded(self.steps, k, since, self.last_step)

        first, second, ascent, metric = pd.adam(state, climb, k)
        moved = ascent.mul_(per_row(pace, x)).add_(x).clamp_(*problem.threat.box).sub_(x0)
        norm_weight = pace * (1 - state.weight) / state.weight
        change = proximal(problem, moved.flatten(1), metric.flatten(1), norm_weight.unsqueeze(1)).view_as(x)
        dual, weight = pd.dual_step(state, view.met, k, self.steps, self.dual_size)
        x = problem.project(change.add_(x0))
        return replace(
            state, x=x, done=nothing_left(problem), first=first, second=second, dual=dual, weight=weight, since=since
        )


def proximal(problem: Problem, v: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """argmin_z weight ||z|| + sum_i h_i (z_i - v_i)^2 / 2, rows [B, D], weight [B, 1]."""
    region = problem.threat.region
    if isinstance(region, L1):
        return v.sign() * (v.abs() - weight / h).clamp_min_(0.0)
    if isinstance(region, Linf):
        # |z_i| = min(|v_i|, t), where what is cut off weighs as much as the norm: sum_i h_i (|v_i| - t)+ = weight
        size, order = v.abs().sort(dim=1, descending=True, stable=True)
        h = h.gather(1, order)
        cut = ((h * size).cumsum(1) - weight) / h.cumsum(1)
        t = cut.amax(1, keepdim=True).clamp_min_(0.0)
        return torch.minimum(torch.maximum(v, -t), t)
    # z_i = v_i h_i n / (h_i n + weight) with n = ||z||: n falls to its fixed point
    z = v
    for _ in range(5):
        pull = h * torch.linalg.vector_norm(z, dim=1, keepdim=True)
        z = v * (pull / (pull + weight).clamp_min_(torch.finfo(v.dtype).tiny))
    return z
