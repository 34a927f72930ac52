"""Carlini and Wagner's attacks in L2, Linf and L0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._adam import Adam, slope, to_point, to_variable
from mohs.attacks._base import State
from mohs.attacks._searches import Search, search_of, shortfall, stalled
from mohs.attacks._settings import check_whole
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access

FADE = 0.01
"""Share of the first step length that is left at the end of a round: what Adam's chatter adds to the change."""


@dataclass(kw_only=True)
class CarliniWagnerState(State):
    """``w`` [B, ...]: the variable; ``adam``: its moments; ``search``: weight and bounds of the round; ``loss`` [B]: lowest
    of the round, ``checked`` [B]: when last checked."""

    w: Tensor
    adam: Adam
    search: Search | None = None
    loss: Tensor
    checked: Tensor


@dataclass(frozen=True)
class CarliniWagner:
    """The smallest change in L2, Linf or L0 by descending a penalty and the missed logits together, in rounds.

    A round minimises, with Adam, over a variable that cannot leave the box,

        penalty(r) + c * f(x),     f(x) = max(0, logits that the goal is missed by)
        L2:    penalty |r|^2;                  c is bisected between one that failed and one that succeeded
        Linf:  penalty sum(max(|r| - tau, 0)); after a success tau falls to 0.9 of the largest change
        L0:    penalty |r|^2;                  after a success the positions of smallest r * f' are put back and stay

    where r = x - x0, and the next round starts from there. Long the measure of defenses, and still strong: give it a few
    hundred passes. It fails where gradients are masked. ``confidence`` (paper: kappa) is an argument of ``mohs.attack``.

    Args:
        steps: gradient steps of all rounds together (the paper: 9 rounds of 10,000).
        inner: steps of one round at most; a quarter of them before the row's first success. A round ends
            earlier where its loss stalls, and in Linf and L0 with its success.

    Cost: steps + 1 forwards and steps backwards; a row ends earlier where its bracket is closed to 1%, or where (L0) no
    position can be missed.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> x, y = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
    >>> [round(float(mohs.attack(CarliniWagner(), net, x, y, f"{p}:inf").size), 2) for p in ("l2", "linf", "l0")]
    [0.14, 0.1, 1.0]

    **Differs from the paper**: the variable is the argument of a sine, not of tanh: numbers at a bound, which tanh pushes to
    infinity, can move; first weight and step lengths are relative to the distance to the boundary linearised at the
    first point, where the paper's constants know one scale only, and step lengths fall along a cosine within a round;
    rows end their rounds one by one and begin the next where they are; in L2 a c fails whose last ten looks failed, and
    grows threefold, not tenfold; where Linf fails at five weights, tau is bisected instead of the search ended; L0 puts
    back 30% of the positions at first (down to the radius, where there is one), half as many after each failure.
    **Source**: N. Carlini, D. Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, sections V and VI
    (objective f6, the box by change of variables; VI.A L2, VI.B L0, VI.C Linf).
    """

    steps: int = 500
    inner: int = 100
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l2", "linf", "l0")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "inner")

    def init(self, problem: Problem) -> CarliniWagnerState:
        """At the clean input, or where the caller says."""
        x = problem.begin()
        w = to_variable(x, problem.threat.box)
        inf = torch.full_like(problem.eps, math.inf)
        return CarliniWagnerState(x, w=w, adam=Adam.fresh(w), loss=inf, checked=inf.clone())

    def step(self, problem: Problem, state: CarliniWagnerState, k: int) -> CarliniWagnerState:
        """One step of Adam; where it ends a round, the next one is prepared."""
        x, w, adam, search = state.x, state.w, state.adam, state.search
        box = problem.threat.box
        view = problem.linearize(x, margin)
        g = view.gradient()
        f = shortfall(problem, view)
        if search is None:
            search = search_of(problem).first(problem, f, g, w)
        search = search.saw(problem, view, g, w, x)
        size, pull = search.penalty(x - problem.x0)
        loss = torch.fmin(state.loss, size + search.c * f)

        gradient = (pull - g * per_row(search.c * (f > 0), g)) * slope(w, box)
        part = (1 + torch.cos(math.pi * adam.age / self.inner)) / 2
        change, adam = adam.move(gradient, search.rate * (FADE + (1 - FADE) * part))
        w = w + change
        # what follows is for rows at the end of a round
        stuck, checked = stalled(loss, state.checked, adam.age, self.inner)
        limit = torch.where(problem.found.met, self.inner, max(1, self.inner // 4))
        ended = (adam.age >= limit) | stuck | search.over()
        if bool(ended.any()):
            search, w = search.next_round(ended, w)
            adam = adam.restart(ended)
            loss, checked = (v.masked_fill(ended, math.inf) for v in (loss, checked))
        done = search.finished | (view.met & (x == problem.x0).flatten(1).all(1))
        x = search.place(to_point(w, box), problem.x0)
        return CarliniWagnerState(x, done, w=w, adam=adam, search=search, loss=loss, checked=checked)
