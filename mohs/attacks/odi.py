"""Projected gradient descent from a start that is spread out in the space of logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mohs import streams
from mohs.attacks._base import State
from mohs.attacks._settings import check_whole
from mohs.attacks.pgd import PGD, step_sizes, usual_step
from mohs.objectives import Objective, margin
from mohs.problem import Problem
from mohs.regions import Lp
from mohs.threat import Threat

DIRECTION = 2  # draw number: 0 and 1 made the random start


@dataclass(frozen=True)
class ODI(PGD):
    """PGD whose first steps climb a random direction of the logits: restarts that differ in what the model sees.

        w ~ U(-1, 1)^K, once per restart
        for the first ``diversify`` steps:  x_(k+1) = project(x_k + eps * steepest(grad <w, z(x_k)>))
        then PGD

    Noise on the input hardly moves the logits of a smooth model, so its restarts end in the same maximum; these do not. Use it
    with many restarts. One run is no stronger than one of PGD.

    Args:
        steps: gradient steps in all.
        step_size: length of PGD's steps in the region's norm, input units; None: 2.5 * eps over their number (L0,
            patches: see the region).
        random_start: start at a random point and diversify; False: PGD from the clean input.
        objective: what to climb after that.
        diversify: how many steps diversify; at most half of all.

    Cost: at most steps + 1 forwards and steps backwards per restart; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(ODI(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:0.2", restarts=2)
    >>> bool(out.success)
    True

    **Differs from the paper**: any region, where L0 and patches diversify with steps of their default length; each row has its own
    direction.
    **Source**: Y. Tashiro, Y. Song, S. Ermon, "Diversity can be transferred: output diversification for white- and black-box
    attacks", NeurIPS 2020, section 3.1, equations 2 and 3.
    """

    steps: int = 22
    objective: Objective = margin
    diversify: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "diversify", least=0)

    def own_step(self, threat: Threat) -> float:
        """Length of PGD's steps at the threat's radius, in units of ``step_size``."""
        return usual_step(threat, self.steps - self.first()) if self.step_size is None else self.step_size

    def first(self) -> int:
        """How many steps go along the random direction."""
        return min(self.diversify, self.steps // 2) if self.random_start else 0

    def step(self, problem: Problem, state: State, k: int) -> State:
        """A step along the random direction, or one of PGD."""
        first = self.first()
        view = problem.linearize(state.x, self.objective)
        if k < first:
            region, box = problem.threat.region, problem.threat.box
            size = problem.eps if isinstance(region, Lp) else region.default_step(problem.eps, 1, box)
            return State(problem.advance(state.x, view.pull(direction(problem, view.logits)), size))
        size = step_sizes(problem, self.step_size, self.steps - first)
        return State(problem.advance(state.x, view.gradient(), size))


def direction(problem: Problem, logits: Tensor) -> Tensor:
    """The row's random direction, uniform in (-1, 1), [B, K]."""
    return streams.uniform(problem.key, tuple(logits.shape[1:]), draw=DIRECTION, dtype=logits.dtype).mul_(2).sub_(1)
