"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent
from mohs.objectives import Objective, cross_entropy
from mohs.problem import Problem
from mohs.threat import Access, Threat


@dataclass(frozen=True)
class PGD:
    """Steepest ascent of the loss from a random point of the ball, projected back after every step.

        x_(k+1) = project(x_k + step_size * steepest(grad J(x_k, y)))

    The workhorse: strong on smooth losses, in every region. Give it restarts. It fails where gradients are masked, and
    where a fixed step is too coarse at the end or too small to leave a plateau.

    Args:
        steps: gradient steps.
        step_size: length of a step in the region's norm, input units; None: 2.5 * eps / steps (L0, patches: see the region).
        random_start: start at a random point of region and box, else at the clean input.
        objective: what to climb.

    Cost: at most steps + 1 forwards and steps backwards per restart; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(PGD(steps=10), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:0.2", restarts=2)
    >>> bool(out.success), bool(out.size <= 0.2001)
    (True, True)

    **Differs from the paper**: the L1 step is shared by the top 1% of coordinates; rows leave at their first success; the
    best point seen is kept, not the last.
    **Source**: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards deep learning models resistant to
    adversarial attacks", ICLR 2018, section 2.1.
    """

    steps: int = 40
    step_size: float | None = None
    random_start: bool = True
    objective: Objective = cross_entropy
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ascent(self)

    @property
    def random(self) -> bool:
        """Do restarts differ?"""
        return self.random_start

    def own_step(self, threat: Threat) -> float:
        """Length of a step at the threat's radius, in units of ``step_size``."""
        return usual_step(threat, self.steps) if self.step_size is None else self.step_size

    def init(self, problem: Problem) -> State:
        """A random point of the region, or the clean input."""
        return State(problem.start() if self.random_start else problem.begin())

    def step(self, problem: Problem, state: State, k: int) -> State:
        """One step along the gradient and back into the region."""
        g = problem.gradient(state.x, self.objective)
        size = step_sizes(problem, self.step_size, self.steps)
        return State(problem.advance(state.x, g, size))


def usual_step(threat: Threat, steps: int) -> float:
    """The region's default at the threat's radius."""
    eps = torch.tensor([threat.region.eps], dtype=torch.float64)
    return float(threat.region.default_step(eps, steps, threat.box))


def step_sizes(problem: Problem, step_size: float | None, steps: int) -> Tensor:
    """[B]: the given step length, or the region's default for each row's radius."""
    if step_size is None:
        return problem.threat.region.default_step(problem.eps, steps, problem.threat.box)
    return torch.full_like(problem.eps, step_size)
