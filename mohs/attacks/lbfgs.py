"""The box-constrained L-BFGS attack."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._searches import Weight, distance, known, shortfall
from mohs.attacks._settings import check_whole
from mohs.objectives import likelihood, margin
from mohs.problem import Problem
from mohs.regions import Box, per_row
from mohs.threat import Access

ENOUGH = 1e-4
"""Armijo's constant: a trial must bring this share of the descent that the slope promises."""

LEVEL = 1e-4
"""A round ends where an accepted step brought less than this share of the function, or halving led below this length."""


SMOOTH = 0.1
"""Width of the loss's corner relative to the gap at the first point: wider is easier to descend, but the sum over all other
classes then drowns the strongest."""

ANGLE = 1e-3
"""Cosine to the negative gradient below which a way is not taken."""

FLAT = 1e-8
"""Curvature below this share is rounding, or a kink, and is not remembered."""


@dataclass(kw_only=True)
class LBFGSState(State):
    """``x`` is a trial; ``point`` [B, ...] the last one accepted, with ``loss`` [B] and its gradient ``slope`` [B, ...];
    ``heading`` [B, ...]: the way to the trial, ``length`` [B] of it taken; ``moves`` and ``bends`` [B, memory, D]: latest
    changes of the point and of the loss's gradient; ``unit`` [B]: logits that count as one; ``age`` [B]: steps since the
    round began; ``met`` [B]: does the point meet the goal; ``search``: the weight of the loss."""

    point: Tensor
    loss: Tensor
    slope: Tensor
    heading: Tensor
    length: Tensor
    moves: Tensor
    bends: Tensor
    unit: Tensor
    age: Tensor
    met: Tensor
    search: Weight | None = None


@dataclass(frozen=True)
class LBFGS:
    """The smallest L2 change by a quasi-Newton method: the first attack on neural networks.

    For a weight c, L-BFGS inside the box minimises

        |r|^2 + c * loss(x0 + r),     loss = -log p(goal)

    and c is bisected for the smallest at which the minimiser meets the goal. The loss is the cross-entropy of the class to
    reach; where a class is to be left, it is that of 'any other class', -log(1 - p). Each row has its own line search, its
    own memory of curvature and its own c. One of the strongest L2 attacks for its passes: fifty to a hundred suffice, because
    the neighbouring c begins where the last one ended. It fails where gradients are masked or jump: its line search stalls.

    Args:
        steps: evaluations at most, of all rounds together.
        inner: evaluations spent on one c at most.
        memory: how many changes of the gradient the Hessian is made of.

    Cost: steps + 1 forwards and steps backwards; rows whose c is known to 1% end earlier.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(LBFGS(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 2)  # exactly 0.2 / sqrt(2)
    0.14

    **Differs from the paper**: c weighs the loss and not the change (its reciprocal), and the change is squared, as in the
    implementations; the loss of the untargeted form, which the paper does not have; logits are measured in units of the
    gap at the first point, where the paper's loss saturates on confident nets; c starts at the solution of the linearised
    problem; rounds start where the last one ended.
    **Source**: C. Szegedy, W. Zaremba, I. Sutskever, J. Bruna, D. Erhan, I. Goodfellow, R. Fergus, "Intriguing properties
    of neural networks", ICLR 2014, section 4.1; the two-loop recursion: J. Nocedal, S. Wright, "Numerical optimization",
    algorithm 7.4.
    """

    steps: int = 100
    inner: int = 10
    memory: int = 8
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        check_whole(self, "steps", "inner", "memory")

    def init(self, problem: Problem) -> LBFGSState:
        """At the clean input, or where the caller says, remembering nothing."""
        x = problem.begin()
        none = x.new_zeros(len(x), self.memory, x[0].numel())
        one, age = torch.ones_like(problem.eps), torch.zeros_like(problem.goal.label)
        zero = torch.zeros_like(x)
        inf = torch.full_like(problem.eps, math.inf)
        return LBFGSState(
            x, point=x.clone(), loss=inf, slope=zero, heading=zero.clone(), length=one, moves=none, bends=none.clone(),
            unit=one.clone(), age=age, met=inf < 0,
        )  # fmt: skip

    def step(self, problem: Problem, state: LBFGSState, k: int) -> LBFGSState:
        """Judge the trial; from the point accepted go a new way, or else half the way."""
        x, x0, box, search, unit = state.x, problem.x0, problem.threat.box, state.search, state.unit
        view = problem.linearize(x, margin)
        if search is None:
            gap = shortfall(problem, view)
            unit = SMOOTH * torch.nan_to_num(view.margin.abs(), nan=1.0, posinf=1.0).clamp_min(
                torch.finfo(x.dtype).tiny
            )
        value, cotangent = likelihood(view.logits, problem.goal, unit)
        loss, slope = -value, -view.pull(cotangent)
        if search is None:
            search = self._first(problem, gap, slope)

        # Armijo's rule
        r, moved = x - x0, x - state.point
        here, there = r.square().flatten(1).sum(1), (state.point - x0).square().flatten(1).sum(1)
        value, before = here + search.c * loss, there + search.c * state.loss
        gradient = 2 * (state.point - x0) + per_row(search.c, x) * state.slope
        accepted = (value <= before + ENOUGH * _dot(gradient, moved)) | state.loss.isinf()
        keep = per_row(accepted, x)
        fresh = accepted & state.loss.isfinite()
        moves, bends = (
            _push(fresh, new, old) for new, old in ((moved, state.moves), (slope - state.slope, state.bends))
        )
        point, slope = torch.where(keep, x, state.point), torch.where(keep, slope, state.slope)
        loss = torch.where(accepted, loss, state.loss)
        length = torch.where(accepted, 1.0, state.length / 2)
        met, age = torch.where(accepted, view.met, state.met), state.age + 1

        stuck = (fresh & (before - value <= LEVEL * before)) | (length < LEVEL)
        ended = (age >= self.inner) | stuck
        if bool(ended.any()):
            search, point = replace(search, won=met).next_round(ended, point)
            age, length = age.masked_fill(ended, 0), length.masked_fill(ended, 1.0)
        gradient = 2 * (point - x0) + per_row(search.c, x) * slope
        newton = self._newton(gradient, point, moves, bends, search.c, box)
        heading = torch.where(per_row(accepted | ended, x), newton, state.heading)
        trial = (point + per_row(length, x) * heading).clamp_(*box)
        done = search.finished | (view.met & (x == x0).flatten(1).all(1))
        return LBFGSState(
            trial, done, point=point, loss=loss, slope=slope, heading=heading, length=length, moves=moves, bends=bends,
            unit=unit, age=age, search=search, met=met,
        )  # fmt: skip

    @staticmethod
    def _first(problem: Problem, gap: Tensor, slope: Tensor) -> Weight:
        """On a linear model of two classes, whose loss has half its slope on the boundary, this c's minimiser lies there."""
        norm = slope.flatten(1).norm(dim=1)
        c = known(4 * distance(problem, gap / norm, 2) / norm)
        return Weight.at(c, c)

    @staticmethod
    def _newton(gradient: Tensor, point: Tensor, moves: Tensor, bends: Tensor, c: Tensor, box: Box) -> Tensor:
        """Two-loop recursion among the coordinates that the box lets follow the gradient; [B, ...]."""
        held = ((point >= box[1]) & (gradient < 0)) | ((point <= box[0]) & (gradient > 0))
        g = gradient.masked_fill(held, 0.0).flatten(1)
        s = moves.masked_fill(held.flatten(1).unsqueeze(1), 0.0)
        y = torch.where(s != 0, 2 * s + c.view(-1, 1, 1) * bends, 0.0)  # |r|^2 bends by 2 whatever the weight
        sy, yy = (s * y).sum(2), y.square().sum(2)
        bent = sy > FLAT * yy
        rho = torch.where(bent, 1 / sy, 0.0)
        d, shares = g, []
        for i in range(s.shape[1]):
            shares.append(rho[:, i] * (s[:, i] * d).sum(1))
            d = d - shares[i].unsqueeze(1) * y[:, i]
        d = d * torch.where(bent[:, 0], sy[:, 0] / yy[:, 0], 0.5).unsqueeze(1)  # 1/2 inverts |r|^2
        for i in reversed(range(s.shape[1])):
            d = d + (shares[i] - rho[:, i] * (y[:, i] * d).sum(1)).unsqueeze(1) * s[:, i]
        free = ~held.flatten(1)
        newton, plain = ((point - (v * free).view_as(point)).clamp_(*box) - point for v in (d, g / 2))
        # the box may bend a quasi-Newton step until it climbs; the gradient's it cannot
        steep = _dot(gradient, newton) < -ANGLE * g.norm(dim=1) * newton.flatten(1).norm(dim=1)
        return torch.where(per_row(steep, point), newton, plain)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _push(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Put ``new`` in front of the memory [B, m, D] of the ``rows``; the oldest falls out."""
    return torch.where(rows.view(-1, 1, 1), torch.cat([new.flatten(1).unsqueeze(1), old[:, :-1]], 1), old)
