"""The basic iterative method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent
from mohs.attacks.pgd import step_sizes, usual_step
from mohs.objectives import Objective, cross_entropy
from mohs.problem import Problem
from mohs.threat import Access, Threat


@dataclass(frozen=True)
class BIM:
    """FGSM in small steps from the clean input, clipped to the ball after each.

        x_(k+1) = clip(x_k + step_size * sign(grad J(x_k, y)))

    Deterministic: a second restart gives the same answer. PGD with a random start is stronger with restarts.

    Args:
        steps: gradient steps.
        step_size: length of a step in the region's norm, input units; None: eps / steps, which just reaches the edge.
        objective: what to climb.

    Cost: at most steps + 1 forwards and steps backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(BIM(steps=10), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "linf:0.15")
    >>> int(out.forwards), int(out.backwards)  # leaves as soon as the answer flips
    (8, 8)

    **Differs from the paper**: any region; step size in input units with a default for any eps (the paper: one grey level
    and min(eps + 4, 1.25 eps) steps, eps in grey levels).
    **Source**: A. Kurakin, I. Goodfellow, S. Bengio, "Adversarial examples in the physical world", ICLR 2017 workshop,
    section 2.2.
    """

    steps: int = 10
    step_size: float | None = None
    objective: Objective = cross_entropy
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    last: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ascent(self)

    def own_step(self, threat: Threat) -> float:
        """Length of a step at the threat's radius, in units of ``step_size``."""
        return usual_step(threat, self.steps) / 2.5 if self.step_size is None else self.step_size

    def init(self, problem: Problem) -> State:
        """At the clean input, or where the caller wants."""
        return State(problem.begin())

    def step(self, problem: Problem, state: State, k: int) -> State:
        """One step along the gradient and back into the region."""
        g = problem.gradient(state.x, self.objective)
        size = step_sizes(problem, self.step_size, self.steps)
        if self.step_size is None:
            size = size / 2.5  # the region's default crosses the ball and back; BIM's only reaches the edge
        return State(problem.advance(state.x, g, size))
