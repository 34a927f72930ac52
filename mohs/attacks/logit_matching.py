"""Feature matching past a detector: towards the logits of an example of another class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs._geometry import per_row
from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent
from mohs.attacks.pgd import step_sizes
from mohs.objectives import Objective
from mohs.problem import Goal, Problem
from mohs.threat import Access


@dataclass(kw_only=True)
class MatchingState(State):
    """``wanted`` [B, K]: the logits to come near to; nothing at first."""

    wanted: Tensor


@dataclass(frozen=True)
class LogitMatching:
    """Comes near to the logits of an example of another class, of all classes, instead of raising one over another.

        x_(k+1) = project(x_k - (1 - k / steps) * step_size * steepest(grad |z(x_k) - z(x_t)|^2 / 2)),   x_t = ``start``

    A detector looks at how answers come about: at margins that are too large, at logits that react to noise unlike those of clean
    inputs. A point with the logits of a clean example, of another class and not rejected, gives such a detector nothing to see. It
    climbs no margin, so it may succeed where that has local maxima, and is weaker elsewhere.

    Args:
        steps: gradient steps; the first is the look at the example.
        step_size: length of the first step in the region's norm, input units; they shrink evenly to nothing, as it is a point that is
            looked for, and not a direction. None: 5 * eps / steps (L0, patches: twice the region's usual one).
        random_start: begin at a random point of region and box, else at the clean input.

    The logit of a rejection is left out. A detector that looks at inner layers is met as far as it follows from the classes' logits;
    use OrthogonalPGD and WeightedPGD as well.

    Without ``start``, and where the model calls the example as it should call the input, the logits wanted are those that were
    seen with two of them exchanged: the label's and the highest other (the aim's, the target's).

    Cost: at most steps + 1 forwards and steps - 1 backwards per restart; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> x, y, other = torch.tensor([[0.6, 0.4]]), torch.tensor([0]), torch.tensor([[0.3, 0.5]])
    >>> out = mohs.attack(LogitMatching(steps=20), net, x, y, "linf:0.2", start=other, stop=mohs.Stop.BUDGET)
    >>> [[round(v, 1) for v in row] for row in net(out.x).tolist()]  # as near as the radius lets it
    [[0.4, 0.5]]

    **Differs from the paper**: any number of classes and any region; what is looked at is the logits, where other detectors may ask
    for those of an inner layer (give a guide whose answers these are).
    **Source**: F. Tramer, N. Carlini, W. Brendel, A. Madry, "On adaptive attacks to adversarial example defenses", NeurIPS 2020,
    the section on The Odds are Odd, whose detector the matching of logits evades.
    """

    steps: int = 100
    step_size: float | None = None
    random_start: bool = True
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    outside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ascent(self)

    @property
    def random(self) -> bool:
        """Do restarts differ?"""
        return self.random_start

    def init(self, problem: Problem) -> MatchingState:
        """At the example."""
        return MatchingState(x=problem.begin(), wanted=problem.x0.new_zeros(len(problem.x0), 0))

    def step(self, problem: Problem, state: MatchingState, k: int) -> MatchingState:
        """Remember the example's logits, or one step towards them."""
        if k == 0:
            wanted = _other(problem.linearize(state.x).logits, problem.goal)
            return replace(state, x=self._begin(problem), wanted=wanted)
        g = problem.gradient(state.x, _towards(state.wanted))
        first = 2 * step_sizes(problem, None, self.steps) if self.step_size is None else self.step_size
        size = (1 - k / self.steps) * first * torch.ones_like(problem.eps)
        return replace(state, x=problem.advance(state.x, g, size))

    def _begin(self, problem: Problem) -> Tensor:
        if not self.random_start:
            return problem.x0.clone()
        return problem.threat.region.start(problem.x0, problem.eps, problem.threat.box, problem.key)


def _towards(wanted: Tensor) -> Objective:
    """Minus half of the squared distance to these logits [B, K], [B], and its derivative."""

    @Objective
    def near(logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        gap = wanted - logits
        if goal.reject is not None:  # often far steeper than the others, which it would drown
            gap[:, goal.reject] = 0
        return -gap.square().sum(1) / 2, gap

    return near


def _other(logits: Tensor, goal: Goal) -> Tensor:
    """The logits where they reach the goal; else with what wins and what ought to win exchanged."""
    seen = logits
    if goal.reject is not None and not bool((goal.reach & (goal.label == goal.reject)).any()):
        seen = logits.index_fill(1, torch.tensor([goal.reject], device=logits.device), -torch.inf)
    up, down = goal.contest(seen)
    reached = goal.reached(logits.argmax(1))
    swapped = logits.clone()
    swapped.scatter_(1, up.unsqueeze(1), logits.gather(1, down.unsqueeze(1)))
    swapped.scatter_(1, down.unsqueeze(1), logits.gather(1, up.unsqueeze(1)))
    return torch.where(per_row(reached, logits), logits, swapped)
