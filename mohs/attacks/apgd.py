"""Auto-PGD: gradient ascent with momentum that sets its own step size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent
from mohs.look import View
from mohs.objectives import Objective, probability_margin
from mohs.problem import Problem
from mohs.regions import L1, Box, per_row
from mohs.threat import Access

MOMENTUM = 0.75  # weight of the gradient step against the last move
RISES = 0.75  # of the steps must gain, or the step size is halved
WIDER = ((0.0, 3.0), (0.3, 2.0), (0.6, 1.0))  # L1: from which share of the steps, how many times the radius


@dataclass(kw_only=True)
class APGDState(State):
    """``x`` and ``last`` are the latest two points; ``best`` [B, ...] the best one, ``slope`` its gradient, ``top`` [B] its value
    and ``lead`` its margin; ``value`` [B] that of the latest point. Since the last checkpoint: ``rises`` [B] counts gains,
    ``before`` is what ``top`` was there, ``halved`` whether the step ``size`` [B] changed. L1: ``spread`` [B] is how many coordinates
    differed at the last checkpoint, ``width`` how many a step moves."""

    last: Tensor
    best: Tensor
    slope: Tensor
    top: Tensor
    lead: Tensor
    value: Tensor
    rises: Tensor
    before: Tensor
    halved: Tensor
    size: Tensor
    spread: Tensor
    width: Tensor


@dataclass(frozen=True)
class APGD:
    """Gradient ascent with momentum that halves its step, and goes back to its best point, when progress stalls.

    No step size to tune, and steps that are large at first and small at the end: stronger than PGD for the same passes, and the
    workhorse of AutoAttack. Like all gradient attacks it fails where gradients are masked; give it several objectives,
    restarts and aims.

        z = project(x_k + size * steepest(grad f(x_k)))
        x_(k+1) = project(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_(k-1)))
        at a checkpoint w_j: if fewer than 3/4 of the steps since w_(j-1) raised f,
            or neither size nor best f changed since:  size /= 2, x = the best point so far

    size starts at 2 eps; the checkpoints are at 22%, 41%, 57%, ... of the steps. In L1 a step moves the coordinates of largest
    gradient, without momentum:

        x_(k+1) = project(x_k + size * sign(g') / ||sign(g')||_1),  g': the ``width`` largest entries of the gradient
        at a checkpoint:  width = ||best - x0||_0 / 1.5
            if ||best - x0||_0 fell by 5%:  size = eps, x = best;  else: size = max(size / 1.5, eps / 10)

    and 30% of the steps run at 3 eps, 30% at 2 eps, the rest at eps (fewer than 3 steps: all at eps).

    Args:
        steps: gradient steps.
        random_start: start at a random point of region and box, else at the clean input.
        objective: what to climb.

    Cost: at most steps + 1 forwards and steps backwards per restart; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(APGD(steps=10), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:0.1415")
    >>> bool(out.success)  # the exact distance is 0.14142
    True

    **Differs from the paper**: the objective is the margin of probabilities by default, and among equal values the larger margin is
    better; norms other than 1, 2 and inf step and project as the region does; L1 starts where a tenth of the coordinates
    are changed, and passes over coordinates that the box does not let follow their gradient; the gradient at the last
    iterate, which nobody uses, is not computed.
    **Source**: F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020, algorithm 1; L1: F. Croce, M. Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image
    classifiers", ICML 2021, algorithm 1 and section 4.2.
    """

    steps: int = 100
    random_start: bool = True
    objective: Objective = probability_margin
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        check_ascent(self)

    @property
    def random(self) -> bool:
        """Do restarts differ?"""
        return self.random_start

    @cached_property
    def checkpoints(self) -> dict[int, int]:
        """Step -> steps since the checkpoint before, equation 3: ever shorter periods, of 6% at least."""
        marks, now, period = {0: 0}, 0.0, 0.22
        while (now := now + period) < 1:
            mark = math.ceil(round(now * self.steps, 9))
            marks.setdefault(mark, mark - max(marks))
            period = max(period - 0.03, 0.06)
        return marks

    def init(self, problem: Problem) -> APGDState:
        """A random point of the region, the clean input, or the caller's point."""
        x = problem.start() if self.random_start else problem.begin()
        low = torch.full_like(problem.eps, -math.inf)
        size, spread = 2 * problem.eps, low
        if isinstance(problem.threat.region, L1):
            _, _, times = self._stage(0)
            size = times * problem.eps
            if self.random_start and problem.warm is None:
                # a uniform point changes every coordinate a little; of ten times its change a tenth of them survives
                far = problem.x0 + 10 * times * (x - problem.x0)
                x = problem.threat.region.project(far, problem.x0, size, problem.threat.box)
            spread = changed(x, problem.x0)
        total = x[0].numel()
        return APGDState(
            x=x, last=x, best=x, slope=torch.zeros_like(x), top=low, lead=low, value=low, rises=torch.full_like(low, -1.0),
            before=low, halved=torch.ones_like(low, dtype=torch.bool), size=size,
            spread=torch.where(spread > 0, spread, total), width=torch.where(spread > 0, spread / 1.5, total / 5),
        )  # fmt: skip

    def step(self, problem: Problem, state: APGDState, k: int) -> APGDState:
        """Look, keep the best, judge the progress at a checkpoint, and move."""
        view = problem.linearize(state.x, self.objective)
        g = view.gradient()
        state = keep_best(state, view, g)
        if isinstance(problem.threat.region, L1):
            return self._sparse_step(problem, state, g, k)
        x, size, halved = state.x, state.size, state.halved
        rises, before = state.rises, state.before
        if k and k in self.checkpoints:
            stalled = rises <= RISES * self.checkpoints[k]
            halved = stalled | (~halved & (state.top <= before))
            size = torch.where(halved, size / 2, size)
            x = torch.where(per_row(halved, x), state.best, x)
            g = torch.where(per_row(halved, x), state.slope, g)
            rises, before = torch.zeros_like(rises), state.top
        z = problem.advance(x, g, size)
        if k:
            z = problem.project(x + MOMENTUM * (z - x) + (1 - MOMENTUM) * (x - state.last))
        return replace(state, x=z, last=x, rises=rises, before=before, halved=halved, size=size)

    def _sparse_step(self, problem: Problem, state: APGDState, g: Tensor, k: int) -> APGDState:
        """The step in L1, where the ball shrinks in three stages and the step learns how sparse to be."""
        region, x0, box = problem.threat.region, problem.x0, problem.threat.box
        begin, period, times = self._stage(k)
        eps = times * problem.eps
        if k and k == begin:  # into the smaller ball, and start anew from the best point
            x = region.project(state.best, x0, eps, box)
            low, spread = torch.full_like(eps, -math.inf), changed(x, x0)
            return replace(state, x=x, top=low, lead=low, size=eps, spread=spread, width=spread / 1.5)
        x, size, spread, width = state.x, state.size, state.spread, state.width
        if k > begin and (k - begin) % period == 0:
            spread = changed(state.best, x0)
            sparser = spread < 0.95 * state.spread
            width = spread / 1.5
            size = torch.where(sparser, eps, torch.maximum(size / 1.5, eps / 10))
            x = torch.where(per_row(sparser, x), state.best, x)
            g = torch.where(per_row(sparser, x), state.slope, g)
        z = region.project(sparse_move(x, g, size, width, box), x0, eps, box)
        return replace(state, x=z, size=size, spread=spread, width=width)

    def _stage(self, k: int) -> tuple[int, int, float]:
        """Of the stage that step k is in: first step, steps between checkpoints, times the radius."""
        if self.steps < len(WIDER):  # too few to come back from the wider balls
            return 0, 1, WIDER[-1][1]
        begins = [math.ceil(round(share * self.steps, 9)) for share, _ in WIDER] + [self.steps]
        i = max(i for i in range(len(WIDER)) if begins[i] <= k)
        return begins[i], max(1, math.ceil(0.04 * (begins[i + 1] - begins[i]))), WIDER[i][1]


def keep_best(state: APGDState, view: View, g: Tensor) -> APGDState:
    """Count a rise, and keep point and gradient where the value beats the best so far; among equals the larger margin wins."""
    better = (view.value > state.top) | ((view.value == state.top) & (view.margin > state.lead))
    grown = per_row(better, g)
    return replace(
        state,
        best=torch.where(grown, state.x, state.best),
        slope=torch.where(grown, g, state.slope),
        top=torch.where(better, view.value, state.top),
        lead=torch.where(better, view.margin, state.lead),
        rises=state.rises + (view.value > state.value),
        value=view.value,
    )


def sparse_move(x: Tensor, g: Tensor, size: Tensor, width: Tensor, box: Box) -> Tensor:
    """A step of 1-norm ``size`` [B], shared evenly by the ``width`` [B] coordinates of largest gradient that can follow it."""
    blocked = ((x >= box[1]) & (g > 0)) | ((x <= box[0]) & (g < 0))
    g = g.masked_fill(blocked, 0.0).flatten(1)
    count = width.floor().clamp(1, g.shape[1]).long().unsqueeze(1)
    strength = g.abs()
    least = strength.topk(int(count.max()), dim=1).values.gather(1, count - 1)
    sign = g.sign().mul_(strength >= least)
    step = sign * (size.unsqueeze(1) / sign.abs().sum(1, keepdim=True).clamp_min_(1.0))
    return x + step.view_as(x)


def changed(x: Tensor, x0: Tensor) -> Tensor:
    """How many coordinates differ, [B], as a floating-point number."""
    return (x != x0).flatten(1).sum(1).to(x.dtype)
