"""The fast gradient sign method and its forms for the other norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mohs.attacks._base import State
from mohs.objectives import Objective, cross_entropy
from mohs.problem import Problem
from mohs.threat import Access


@dataclass(frozen=True)
class FGSM:
    """One step to the edge of the ball, along the gradient of the loss at the clean input.

    The point of the region that maximises the linearised objective, clipped to the box:

        x = x0 + eps * sign(grad J(x0, y))          (Linf)
        x = x0 + eps * grad J / ||grad J||_2        (L2)
        x = the coordinates of largest |grad J|, each to its bound of the box, until eps is spent   (L1, L0)

    Cheap, and exact on linear models in Linf. It fails where the loss bends inside the ball; a net trained against it may
    merely have bent the loss (gradient masking), so never report it alone.

    Args:
        objective: what to climb.

    Cost: 2 forwards (gradient, judgement), 1 backward.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(FGSM(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "linf:0.15")
    >>> out.x, out.success
    (tensor([[0.4500, 0.5500]]), tensor([True]))

    **Differs from the paper**: clipped to the box; the L1 form is the exact maximiser inside the box.
    **Source**: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015,
    section 4, first equation.
    """

    objective: Objective = cross_entropy
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    last: ClassVar[bool] = True
    random: ClassVar[bool] = False

    @property
    def steps(self) -> int:
        """One."""
        return 1

    def init(self, problem: Problem) -> State:
        """At the clean input."""
        return State(problem.x0.clone())

    def step(self, problem: Problem, state: State, k: int) -> State:
        """To the extreme point of the region."""
        g = problem.gradient(state.x, self.objective)
        return State(problem.threat.region.extreme(g, problem.x0, problem.eps, problem.threat.box))
