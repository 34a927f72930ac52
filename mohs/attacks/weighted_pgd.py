"""Gradient ascent of a weighted sum of two margins: the classes' and the detector's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._detection import two_goals
from mohs.attacks._settings import check_ascent, check_positive, check_whole
from mohs.attacks.pgd import usual_step
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.threat import Access, Threat


@dataclass(kw_only=True)
class WeightedState(State):
    """``begin``: where each round starts. ``weight`` [B] of the detector, between ``low`` and ``high``; ``fooled`` [B]: were the
    classes wrong at the last look?"""

    begin: Tensor
    weight: Tensor
    low: Tensor
    high: Tensor
    fooled: Tensor


@dataclass(frozen=True)
class WeightedPGD:
    """Against a classifier that rejects: climbs the sum of both margins, the weight of the detector's being searched for each row.

        x_(k+1) = project(x_k + step_size * steepest(grad (classes + weight * detector)))

    classes: the margin of the winning wrong class; detector: that of the winning class over the rejection. The steps are shared
    by rounds that all begin at one point. A round that ends fooled but rejected wants more weight, one whose classes are right
    less: the weight is doubled or halved until both have been seen, then their geometric mean is taken. Of a model that does not
    reject it is PGD on the margin, in rounds from one start.

    Args:
        steps: gradient steps of all rounds.
        rounds: weights that are tried, at most as many as steps.
        weight: the first one.
        step_size: length of a step in the region's norm, input units; None: 2.5 * eps / steps of a round (L0, patches: see the region).
        random_start: start at a random point of region and box, else at the clean input.

    Cost: at most steps + 1 forwards and steps backwards per restart; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(3, 3, bias=False)  # two classes and the rejection
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 1.0]]))
    >>> x, y = torch.tensor([[0.6, 0.4, 0.1]]), torch.tensor([0])
    >>> bool(mohs.attack(WeightedPGD(steps=40), net, x, y, "linf:0.25", reject=2).success)
    True

    **Differs from the paper**: there an optimiser of the size of the change; here steepest steps within a radius.
    **Source**: N. Carlini, D. Wagner, "Adversarial examples are not easily detected: bypassing ten detection methods", AISec 2017,
    whose attacks add the detector's loss to that of the classifier.
    """

    steps: int = 100
    rounds: int = 5
    weight: float = 1.0
    step_size: float | None = None
    random_start: bool = True
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ascent(self)
        check_whole(self, "rounds")
        check_positive(self, "weight")

    @property
    def random(self) -> bool:
        """Do restarts differ?"""
        return self.random_start

    @property
    def each(self) -> int:
        """Steps of a round; the last one may have fewer."""
        return math.ceil(self.steps / self.rounds)

    def own_step(self, threat: Threat) -> float:
        """Length of a step at the threat's radius, in units of ``step_size``."""
        return usual_step(threat, self.each) if self.step_size is None else self.step_size

    def init(self, problem: Problem) -> WeightedState:
        """A random point of the region, or the clean input."""
        x = problem.start() if self.random_start else problem.begin()
        one = torch.ones_like(problem.eps)
        never = torch.zeros_like(problem.found.met)
        return WeightedState(
            x=x,
            begin=x.clone(),
            weight=self.weight * one,
            low=0 * one,
            high=torch.full_like(one, math.inf),
            fooled=never,
        )

    def step(self, problem: Problem, state: WeightedState, k: int) -> WeightedState:
        """One step of a round, or the first of the next."""
        if k and k % self.each == 0:
            state = self._next_round(state)
        view = problem.linearize(state.x, margin)
        classes, detector = two_goals(view.logits, problem.goal)
        cotangent = classes.cotangent
        if detector is not None:
            cotangent = cotangent + state.weight.unsqueeze(1) * detector.cotangent
        region, box = problem.threat.region, problem.threat.box
        size = region.default_step(problem.eps, self.each, box)
        if self.step_size is not None:
            size = torch.full_like(problem.eps, self.step_size)
        x = problem.advance(state.x, view.pull(cotangent), size)
        return replace(state, x=x, fooled=classes.value > 0)

    @staticmethod
    def _next_round(state: WeightedState) -> WeightedState:
        low = torch.where(state.fooled, state.weight, state.low)
        high = torch.where(state.fooled, state.high, state.weight)
        middle = (low * high).sqrt()
        weight = torch.where(state.fooled, 2 * state.weight, state.weight / 2)
        weight = torch.where((low > 0) & high.isfinite(), middle, weight)
        return replace(state, x=state.begin.clone(), weight=weight, low=low, high=high)
