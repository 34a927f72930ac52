"""LaVAN: a patch at a place that is looked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent, check_whole
from mohs.errors import ThreatError
from mohs.objectives import Objective, margin
from mohs.problem import Problem
from mohs.regions import Patch, per_row
from mohs.threat import Access, Threat


@dataclass(kw_only=True)
class LaVANState(State):
    """``places`` [B, windows, 2]: first pixels of the windows tried; ``fill`` [B, ...]: the best values by the gradient at the
    clean input; ``value`` [B]: the highest objective of a trial; ``chosen`` [B]: which trial that was."""

    places: Tensor
    fill: Tensor
    value: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class LaVAN:
    """Tries the windows in which the gradient promises most, then climbs inside the best one.

        g = grad J(x0);  rank the windows by the gain of <g, x> over their values, none over more than half of a better one both ways
        look at ``windows`` of them, every value at its best bound, and keep the one of highest J
        x_(k+1) = clip(x_k + step_size * (1 - k / steps) * sign(grad J(x_k))) inside that window

    PGD climbs where its random start happens to lie; here a look per window finds out where a patch can do something. Restarts
    try the windows that come next. At a fixed place there is nothing to rank: a first try begins at the best bounds, further ones
    at random values. It fails where gradients are masked.

    Args:
        steps: looks in all, at the clean input, at windows and on the way.
        windows: how many windows a restart looks at, at most a quarter of the steps.
        step_size: first step length, input units; None: a quarter of the box.
        objective: what to climb.

    Raises:
        ThreatError: a threat that is no patch, or an infinite box.

    Cost: at most steps + 1 forwards per restart, and steps - windows backwards (steps where no windows are tried); rows stop at
    their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0] * 9, [0.0] * 8 + [4.0]]))
    >>> out = mohs.attack(LaVAN(), net, torch.full((1, 1, 3, 3), 0.4), torch.tensor([0]), "patch:2")
    >>> out.success.tolist(), out.x[0, 0].ne(0.4).nonzero().tolist()
    ([True], [[1, 1], [1, 2], [2, 1], [2, 2]])

    **Differs from the paper**: the place is chosen for each image (the paper gives it, or draws it); steps along the sign that
    shrink; the margin over all other classes where no target is given.
    **Source**: D. Karmon, D. Zoran, Y. Goldberg, "LaVAN: localized and visible adversarial noise", ICML 2018, section 2 and
    algorithm 1.
    """

    steps: int = 80
    windows: int = 20
    step_size: float | None = None
    objective: Objective = margin
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("patch",)
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ascent(self)
        check_whole(self, "windows")

    def own_step(self, threat: Threat) -> float:
        """Length of the first step, in units of ``step_size``."""
        return (threat.box[1] - threat.box[0]) / 4 if self.step_size is None else self.step_size

    def trials(self, region: Patch) -> int:
        """How many windows a restart looks at."""
        count = min(self.windows, self.steps // 4) if region.at is None else 0
        return count if count > 1 else 0

    def init(self, problem: Problem) -> LaVANState:
        """The clean input, or the caller's points."""
        x, rows = problem.begin(), len(problem)
        places = problem.goal.label.new_zeros(rows, max(self.trials(geometry(problem)), 1), 2)
        low = torch.full_like(problem.eps, -math.inf)
        return LaVANState(x=x, places=places, fill=problem.x0, value=low, chosen=places[:, 0, 0])

    def step(self, problem: Problem, state: LaVANState, k: int) -> LaVANState:
        """Rank the windows, look at one of them, or climb."""
        region = geometry(problem)
        trials = self.trials(region)
        if k == 0 and problem.warm is None:
            return self._ranked(problem, region, state, trials)
        if 0 < k <= trials and problem.warm is None:
            value = problem.look(state.x, self.objective).value
            better = value > state.value
            chosen = torch.where(better, k - 1, state.chosen)
            state = replace(state, value=torch.where(better, value, state.value), chosen=chosen)
            return self._at(problem, region, state, chosen if k == trials else torch.full_like(chosen, k))
        g = problem.gradient(state.x, self.objective)
        low, high = problem.threat.box
        size = self.own_step(problem.threat) * (1 - k / self.steps)
        if problem.warm is not None:
            return replace(state, x=problem.advance(state.x, g, torch.full_like(problem.eps, size)))
        return self._at(
            problem, region, replace(state, fill=g.sign().mul_(size).add_(state.x).clamp_(low, high)), state.chosen
        )

    def _ranked(self, problem: Problem, region: Patch, state: LaVANState, trials: int) -> LaVANState:
        """The windows of this restart, and the first of them."""
        g = problem.gradient(state.x, self.objective)
        fill, gain = region.gain(g, problem.x0, problem.threat.box)
        again = problem.restart > 0
        if region.at is None:
            count = max(trials, 1)
            places = apart(region, gain, problem.eps, count * (int(problem.restart.max()) + 1))
            turn = problem.restart.unsqueeze(1) * count + torch.arange(count, device=gain.device)
            places = places.gather(1, turn.unsqueeze(2).expand(-1, -1, 2))
        else:
            places = region.best(gain, problem.eps).unsqueeze(1)
            own = streams.uniform(problem.key, tuple(fill.shape[1:]), dtype=fill.dtype)
            low, high = problem.threat.box
            own = own.mul_(high - low).add_(low).clamp_(low, high)
            fill = torch.where(per_row(again, fill), own, fill)
        return self._at(problem, region, replace(state, places=places, fill=fill), state.chosen)

    def _at(self, problem: Problem, region: Patch, state: LaVANState, which: Tensor) -> LaVANState:
        """The window of that number, filled."""
        place = state.places.gather(1, which.view(-1, 1, 1).expand(-1, 1, 2)).squeeze(1)
        inside = region.window(place, problem.x0, problem.eps)
        return replace(state, x=torch.where(inside, state.fill, problem.x0))


def geometry(problem: Problem) -> Patch:
    """The region, or a ThreatError where it is no patch."""
    region = problem.threat.region
    if not isinstance(region, Patch):
        raise ThreatError(f"This attack places patches; got the threat {problem.threat}. Allowed: such as 'patch:5'.")
    return region


def apart(region: Patch, gain: Tensor, eps: Tensor, count: int) -> Tensor:
    """First pixels of ``count`` windows, [B, count, 2], by falling sum of ``gain`` [B, H, W]; none overlaps one before it by more
    than half of its side both down and across, unless there is no room left: then the ranking begins anew."""
    sums = region.sums(gain, eps)
    rows, columns = (side.view(-1, 1, 1) for side in region.sides(gain, eps))
    down, across = (torch.arange(n, device=gain.device) for n in gain.shape[1:])
    left, places = sums.clone(), []
    for _ in range(count):
        spent = left.flatten(1).amax(1).isinf()
        left = torch.where(spent.view(-1, 1, 1), sums, left)
        at = left.flatten(1).argmax(1)
        row, column = at // gain.shape[2], at % gain.shape[2]
        places.append(torch.stack([row, column], 1))
        near = ((down.view(1, -1, 1) - row.view(-1, 1, 1)).abs() * 2 <= rows - 1) & (
            (across.view(1, 1, -1) - column.view(-1, 1, 1)).abs() * 2 <= columns - 1
        )
        left = left.masked_fill(near, -math.inf)
        left.flatten(1).scatter_(1, at.unsqueeze(1), -math.inf)  # itself, where a side is 0
    return torch.stack(places, 1)
