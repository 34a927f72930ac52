"""Elastic-net attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._searches import Weight, distance, known, shortfall, stalled
from mohs.attacks._settings import check_least, check_share, check_whole
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access

FAR = 30.0
"""How much longer the steps are until a row's first success: the boundary is reached soon, and then approached with care."""

FINE = 1e-3
"""A row is done where its bracket is closed to this share: the change follows the weight more steeply than in L2."""


@dataclass(kw_only=True)
class EADState(State):
    """``last`` [B, ...]: the iterate behind ``x``, which is ahead of it by the momentum; ``age`` [B]: steps since the round
    began; ``search``: the weight of the goal; ``beta`` [B]: that of the 1-norm, input units; ``loss``, ``checked`` [B]:
    lowest of the round, now and when last checked; ``found`` [B]: has the row ever succeeded."""

    last: Tensor
    age: Tensor
    search: Weight | None = None
    beta: Tensor
    loss: Tensor
    checked: Tensor
    found: Tensor


@dataclass(frozen=True)
class EAD:
    """The smallest L1 change by shrinkage: most coordinates stay exactly as they were.

    For a weight c, FISTA minimises the elastic net

        c * f(x) + |r|_2^2 + beta |r|_1,     f(x) = max(0, logits that the goal is missed by)
        x_(k+1) = clip(x0 + shrink(y_k - step (c f' + 2 r) - x0, step * beta))
        y_(k+1) = x_(k+1) + k / (k + 3) (x_(k+1) - x_k)

    where shrink moves every number towards zero by that much, and c is bisected between one that failed and one that
    succeeded. Use it where few large changes are the threat. It needs a good weight, so few passes give little; it
    fails where gradients are masked, and where they are steeper elsewhere it moves the wrong coordinates for good.

    Args:
        steps: gradient steps of all rounds together.
        inner: steps spent on one c at most.
        step_size: of the first step of a round, a factor of the gradient (a half would undo the change at once); it falls
            with the root of what is left of the round, as in the authors' code.
        beta: weight of the 1-norm, relative to the L1 distance to the boundary linearised at the first point (at most
            the box's width).

    Cost: steps + 1 forwards and steps backwards; rows whose c is known to 0.1% end earlier.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    >>> out = mohs.attack(EAD(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l1:inf")
    >>> 0.4 <= float(out.size) < 0.42  # exactly 0.4, all of it on the first number
    True

    **Differs from the paper**: beta and the first c are relative to the linearised distance, where the paper's 1e-3 and 1e-3
    know one scale only, and beta is large, so that the 1-norm rules; one look per step, at y, which lies in the box
    here, instead of gradients at y and tests at x; steps are 30 times as long until the first success; rounds start where
    the last one ended, end early row by row, and count as failed where their last ten looks were; the smallest L1 change
    seen is kept (the paper's L1 rule).
    **Source**: P.-Y. Chen, Y. Sharma, H. Zhang, J. Yi, C.-J. Hsieh, "EAD: elastic-net attacks to deep neural networks via
    adversarial examples", AAAI 2018, equations 3, 6 and 7, algorithm 1.
    """

    steps: int = 500
    inner: int = 100
    step_size: float = 0.005
    beta: float = 3.0
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l1",)

    def __post_init__(self) -> None:
        check_whole(self, "steps", "inner")
        check_share(self, "step_size", most=0.5)  # above, the square term alone makes steps overshoot
        check_least(self, 0, "beta")

    def init(self, problem: Problem) -> EADState:
        """At the clean input, or where the caller says."""
        x = problem.begin()
        inf = torch.full_like(problem.eps, math.inf)
        age, beta = torch.zeros_like(problem.goal.label), torch.zeros_like(inf)
        return EADState(x, last=x.clone(), age=age, beta=beta, loss=inf, checked=inf.clone(), found=inf < 0)

    def step(self, problem: Problem, state: EADState, k: int) -> EADState:
        """One step of FISTA; where it ends a round, the next one is prepared."""
        x0, box, age, search, beta = problem.x0, problem.threat.box, state.age, state.search, state.beta
        view = problem.linearize(state.x, margin)
        g = view.gradient()
        f = shortfall(problem, view)
        if search is None:
            search, beta = self._scaled(problem, f, g)
        search = search.saw(problem, view, g, state.x, state.x)
        r = state.x - x0
        loss = torch.fmin(state.loss, r.square().flatten(1).sum(1) + beta * r.abs().flatten(1).sum(1) + search.c * f)

        rate = self.step_size * (1 - age / self.inner).sqrt() * torch.where(state.found, 1.0, FAR)
        change = r * (1 - 2 * per_row(rate, r)) + g * per_row(rate * search.c * (f > 0), g)
        change = change.sign() * (change.abs() - per_row(rate * beta, r)).clamp_min_(0.0)
        new = (x0 + change).clamp_(*box)
        ahead = new + (new - state.last) * per_row(age / (age + 3), new)
        age = age + 1

        stuck, checked = stalled(loss, state.checked, age, self.inner)
        first = view.met & ~state.found
        ended = (age >= self.inner) | stuck
        anew = ended | first
        if bool(anew.any()):
            search, new = search.next_round(ended, new)
            ahead = torch.where(per_row(anew, new), new, ahead)
            age = age.masked_fill(anew, 0)
            loss, checked = (v.masked_fill(anew, math.inf) for v in (loss, checked))
        closed = search.high - search.low < FINE * search.high
        done = closed | (view.met & (state.x == x0).flatten(1).all(1))
        x = ahead.clamp_(*box)
        return EADState(
            x,
            done,
            last=new,
            age=age,
            search=search,
            beta=beta,
            loss=loss,
            checked=checked,
            found=state.found | view.met,
        )

    def _scaled(self, problem: Problem, f: Tensor, g: Tensor) -> tuple[Weight, Tensor]:
        """On a linear model without a box, this c is the smallest that succeeds."""
        lo, hi = problem.threat.box
        steep = g.abs().flatten(1).amax(1)
        length = distance(problem, f / steep, 1).clamp_max(hi - lo)
        beta = self.beta * length
        c = known((beta + 2 * length) / steep)
        return Weight.at(c, c), beta
