"""Gradient ascent past a detector: orthogonal and selective PGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs._geometry import per_row
from mohs.attacks._base import State
from mohs.attacks._detection import two_goals
from mohs.attacks._settings import check_ascent
from mohs.attacks.pgd import step_sizes, usual_step
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.threat import Access, Threat


@dataclass(frozen=True)
class OrthogonalPGD:
    """Against a classifier that rejects: climbs one of two margins at a time, in directions that leave the other as it is.

        x_(k+1) = project(x_k + step_size * steepest(g - o (g . o) / (o . o)))

    where g is the gradient of the classes' margin while the classes answer as they should, of the detector's margin (the winning
    class against the rejection) as soon as they are wrong, and o that of the other. A sum of two losses has a weight that is hard
    to set, and lets one spoil what the other has won; here there is none. Of a model that does not reject, only the classes'
    margin is there: then this is PGD on the margin.

    Args:
        steps: gradient steps.
        step_size: length of a step in the region's norm, input units; None: 2.5 * eps / steps (L0, patches: see the region).
        random_start: start at a random point of region and box, else at the clean input.
        orthogonal: take the other gradient out; False: only choose between the two (selective PGD), at half of the backwards.

    Cost: at most steps + 1 forwards and 2 * steps backwards per restart (selective: steps); rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(3, 3, bias=False)  # two classes and the rejection
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 1.0]]))
    >>> x, y = torch.tensor([[0.6, 0.4, 0.1]]), torch.tensor([0])
    >>> out = mohs.attack(OrthogonalPGD(steps=20), net, x, y, "linf:0.25", reject=2)
    >>> bool(out.success), int(net(out.x).argmax())
    (True, 1)

    **Differs from the paper**: both losses are margins of logits; steps are steepest in the region's norm; where both gradients
    are parallel, the one that is asked for is followed; rows leave at their first success, and else the point of the largest
    joint margin is kept.
    **Source**: O. Bryniarski, N. Hingun, P. Pachuca, V. Wang, N. Carlini, "Evading adversarial example detection defenses with
    orthogonal projected gradient descent", ICLR 2022, section 4 (selective and orthogonal).
    """

    steps: int = 100
    step_size: float | None = None
    random_start: bool = True
    orthogonal: bool = True
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True

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
        """One step towards the goal that is not met."""
        view = problem.linearize(state.x, margin)
        classes, detector = two_goals(view.logits, problem.goal)
        if detector is None:
            g = view.pull(classes.cotangent)
        else:
            fooled = (classes.value > 0).unsqueeze(1)
            wanted = torch.where(fooled, detector.cotangent, classes.cotangent)
            if self.orthogonal:
                other = torch.where(fooled, classes.cotangent, detector.cotangent)
                g = without(view.pull(wanted, keep=True), view.pull(other))
            else:
                g = view.pull(wanted)
        return State(problem.advance(state.x, g, step_sizes(problem, self.step_size, self.steps)))


def without(g: Tensor, other: Tensor) -> Tensor:
    """``g`` [B, ...] less its part along ``other``; where nothing else is left of it, ``g``.

    >>> without(torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])).tolist()
    [[3.0, 0.0], [2.0, 0.0]]
    """
    flat, along = g.flatten(1).double(), other.flatten(1).double()
    along = along / along.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rest = flat - (flat * along).sum(1, keepdim=True) * along
    left = rest.norm(dim=1) > 1e-6 * flat.norm(dim=1)
    return torch.where(per_row(left, g), rest.view_as(g).to(g.dtype), g)
