"""The momentum iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent, check_least
from mohs.attacks.pgd import usual_step
from mohs.objectives import Objective, cross_entropy
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access, Threat


@dataclass(kw_only=True)
class MomentumState(State):
    """``momentum`` [B, ...] is the accumulated direction, in units of gradients of 1-norm one."""

    momentum: Tensor


@dataclass(frozen=True)
class MIFGSM:
    """BIM along an accumulated gradient, which carries over flat spots and transfers better between models.

        m_(k+1) = decay * m_k + grad J(x_k, y) / ||grad J(x_k, y)||_1
        x_(k+1) = project(x_k + step_size * steepest(m_(k+1)))

    Meant for transfer: give the surrogate as ``guide``. On the model itself PGD with restarts and APGD are stronger, because
    momentum makes the last steps coarse. Deterministic.

    Args:
        steps: gradient steps.
        step_size: length of a step in the region's norm, input units; None: eps / steps (L0, patches: see the region).
        decay: how much of the accumulated direction is kept; 0 is BIM.
        objective: what to climb.

    Cost: at most steps + 1 forwards and steps backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(MIFGSM(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "linf:0.15")
    >>> int(out.forwards), int(out.backwards)  # leaves as soon as the answer flips
    (8, 8)

    **Differs from the paper**: any region; success is looked for at every step.
    **Source**: Y. Dong et al., "Boosting adversarial attacks with momentum", CVPR 2018, algorithm 1 (equations 6 and 7; 9 for
    L2).
    """

    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    objective: Objective = cross_entropy
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ascent(self)
        check_least(self, 0, "decay")

    def own_step(self, threat: Threat) -> float:
        """Length of a step at the threat's radius, in units of ``step_size``."""
        return usual_step(threat, self.steps) / 2.5 if self.step_size is None else self.step_size

    def init(self, problem: Problem) -> MomentumState:
        """At the clean input, without momentum."""
        x = problem.begin()
        return MomentumState(x=x, momentum=torch.zeros_like(x))

    def step(self, problem: Problem, state: MomentumState, k: int) -> MomentumState:
        """Add the gradient to the momentum, and step along it."""
        g = problem.gradient(state.x, self.objective)
        momentum = accumulate(state.momentum, g, self.decay)
        size = edge_step(problem, self.step_size, self.steps)
        return MomentumState(x=problem.advance(state.x, momentum, size), momentum=momentum)


def accumulate(momentum: Tensor, g: Tensor, decay: float) -> Tensor:
    """decay * momentum + g / ||g||_1; a gradient of zero adds nothing, one of 1e-30 as much as any other."""
    tiny = torch.finfo(g.dtype).tiny
    unit = g / per_row(g.abs().flatten(1).amax(1).clamp_min_(tiny), g)
    return decay * momentum + unit / per_row(unit.abs().flatten(1).sum(1).clamp_min_(tiny), g)


def edge_step(problem: Problem, step_size: float | None, steps: int) -> Tensor:
    """[B]: the given step length, or the one that just reaches the edge (the region's default crosses the ball and back)."""
    if step_size is not None:
        return torch.full_like(problem.eps, step_size)
    return problem.threat.region.default_step(problem.eps, steps, problem.threat.box) / 2.5
