"""Primal-dual gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from mohs.attacks import _primal_dual as pd
from mohs.attacks._primal_dual import PrimalDualState
from mohs.attacks._settings import check_positive, check_whole
from mohs.attacks._smallest import nothing_left, unit
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access


@dataclass(frozen=True)
class PDGD:
    """The smallest L2 change as a game: Adam minimises norm and constraint, a dual variable sets their exchange rate.

        min over r, max over w:   (1 - w) ||r|| + w softplus(-margin(x0 + r))
        r_(k+1) = clip(r + pace_k * Adam(gradient of that with respect to r))
        log(w / (1 - w)) falls by dual_size where the goal is met and rises elsewhere

    Smooth, and strong on robust nets; ``PDPGD`` does the same with a proximal step, in L1 and Linf too. It fails where
    gradients are masked, and gains little from fewer than a hundred passes.

    Args:
        steps: gradient steps.
        step_size: Adam's first step, relative to the distance of the linearised boundary per coordinate.
        last_step: Adam's last step, relative to the first; it fades geometrically from the row's first success on.
        ratio: weight of the norm relative to that of the constraint, at the beginning.
        dual_size: step of the dual variable, and at least 10 / steps; it falls tenfold until the end.

    Cost: steps + 1 forwards and steps backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(PDGD(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 3)  # exactly 0.2 / sqrt(2)
    0.141

    **Differs from the paper**: the constraint is divided by the dual norm of its gradient, so that weights and steps do not
    depend on the scale of inputs or logits; steps fade from the first success on, not from the first step.
    **Source**: A. Matyasko, L.-P. Chau, "PDPGD: primal-dual proximal gradient descent adversarial attack", 2021,
    arXiv:2106.01538, algorithm 1.
    """

    steps: int = 500
    step_size: float = 1.0
    last_step: float = 0.01
    ratio: float = 0.01
    dual_size: float = 0.1
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_positive(self, "step_size", "last_step", "ratio", "dual_size")

    def init(self, problem: Problem) -> PrimalDualState:
        """At the clean input, with most of the weight on the constraint."""
        return pd.begin(problem, self.steps, self.ratio)

    def step(self, problem: Problem, state: PrimalDualState, k: int) -> PrimalDualState:
        """One step of Adam on the Lagrangian, one of its multiplier."""
        x = state.x
        view = problem.linearize(x)
        if k == 0:
            state = replace(state, scale=view.value.abs().clamp_min(torch.finfo(x.dtype).tiny))
        climb, g = pd.constraint(problem, view, state.scale)
        if k == 0:
            state = replace(state, pace=self.step_size * pd.pace(problem, view, g))
        since = torch.where(problem.found.met, state.since.clamp_max(k), state.since)
        pace = state.pace * pd.faded(self.steps, k, since, self.last_step)

        shrink = unit(x - problem.x0).mul_(per_row(1 - state.weight, x))
        first, second, ascent, _ = pd.adam(state, climb.mul_(per_row(state.weight, x)).sub_(shrink), k)
        moved = problem.project(ascent.mul_(per_row(pace, x)).add_(x))
        dual, weight = pd.dual_step(state, view.met, k, self.steps, self.dual_size)
        return replace(
            state,
            x=moved,
            done=nothing_left(problem),
            first=first,
            second=second,
            dual=dual,
            weight=weight,
            since=since,
        )
