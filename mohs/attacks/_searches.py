"""What Carlini and Wagner's attacks minimise beside the goal in each region, and what they change from round to round."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mohs._rows import Rows
from mohs.errors import ThreatError
from mohs.look import View
from mohs.problem import Problem
from mohs.regions import L0, Box, Linf, per_row
from mohs.target import rounding

CLOSE = 0.01
"""A bracket is closed where its ends differ by this share: more rounds would gain less."""

GROW = 3
"""By how much a weight that failed grows as long as none has succeeded; the paper's ten needs more rounds to come back."""

QUIET = 10
"""L2: looks without a success after which a round counts as failed; Adam crosses the boundary and back more often."""

TRIES = 4
"""Linf: how often the weight doubles before a ceiling counts as too low."""

STEP = 0.1
"""Linf: first step length of a round relative to its ceiling."""

REACH = 1.1
"""Linf: the first step length of the first round, relative to the linearised distance: a first success soon."""

SHRINK = 0.9
"""Linf: the next ceiling relative to the largest change that sufficed, as in the paper."""

DROP = 0.3
"""L0: share of the changed positions that a round drops at first."""

STALLED = 0.9999
"""A round ends where a tenth of it has not brought its loss below this share, as in the authors' code."""

FARTHEST = 0.3
"""Longest step of the sine's argument: a tenth of the way from bound to bound."""


@dataclass
class Round(Rows):
    """``c`` [B]: weight of the goal; ``rate`` [B]: first step length of a round; ``won`` [B]: has this round succeeded;
    ``finished`` [B]: is there nothing more to gain."""

    c: Tensor
    rate: Tensor
    won: Tensor
    finished: Tensor

    def penalty(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised beside the goal, [B], and its gradient."""
        return r.square().flatten(1).sum(1), 2 * r

    def over(self) -> Tensor:
        """[B] bool: has a round reached its end before its time?"""
        return torch.zeros_like(self.won)

    def place(self, x: Tensor, x0: Tensor) -> Tensor:
        """The point to look at."""
        return x


@dataclass
class Weight(Round):
    """L2: minimise |r|^2 + c f(x) and bisect for the smallest ``c`` between ``low`` (failed) and ``high`` (succeeded).

    A weight succeeds where its descent ends among successes: ``quiet`` [B] looks have gone by since the last one. What is met
    on the way, or still met from the round before, says nothing about the minimiser.
    """

    low: Tensor
    high: Tensor
    quiet: Tensor

    @classmethod
    def first(cls, problem: Problem, gap: Tensor, g: Tensor, w: Tensor) -> Self:
        """On a linear model twice the distance over |g| is the smallest weight that succeeds."""
        norm = g.flatten(1).norm(dim=1)
        far = distance(problem, gap / norm, 2)
        return cls.at(known(2 * far / norm), far * _unit(problem.threat.box) / math.sqrt(w[0].numel()))

    @classmethod
    def at(cls, c: Tensor, rate: Tensor) -> Self:
        """Before the first look."""
        no, inf = torch.zeros_like(c, dtype=torch.bool), torch.full_like(c, math.inf)
        return cls(c, rate, no, no, torch.zeros_like(c), inf, inf.clone())

    def saw(self, problem: Problem, view: View, g: Tensor, w: Tensor, x: Tensor) -> Self:
        quiet = torch.where(view.met, 0.0, self.quiet + 1)
        return replace(self, quiet=quiet, won=quiet < QUIET)

    def next_round(self, ended: Tensor, w: Tensor) -> tuple[Self, Tensor]:
        high = torch.where(ended & self.won, torch.minimum(self.high, self.c), self.high)
        low = torch.where(ended & ~self.won, torch.maximum(self.low, self.c), self.low)
        c = torch.where(ended, torch.where(high.isinf(), GROW * self.c, (low + high) / 2), self.c)
        rate = torch.where(ended & high.isinf(), torch.minimum(2 * self.rate, self.rate.clamp_min(FARTHEST)), self.rate)
        quiet = self.quiet.masked_fill(ended, math.inf)
        return replace(self, c=c, rate=rate, finished=high - low < CLOSE * high, low=low, high=high, quiet=quiet), w


@dataclass
class Ceiling(Round):
    """Linf: minimise sum(max(|r| - tau, 0)) + c f(x), and lower the ceiling ``tau`` as long as that succeeds.

    ``size`` [B] is the smallest success and ``base`` [B, ...] its variable, ``floor`` [B] the highest ceiling that failed
    at all weights, ``least`` [B] the first weight, ``unit`` [B] the variable's length of an input unit.
    """

    tau: Tensor
    floor: Tensor
    size: Tensor
    base: Tensor
    least: Tensor
    unit: Tensor

    @classmethod
    def first(cls, problem: Problem, gap: Tensor, g: Tensor, w: Tensor) -> Self:
        """A weight at which the goal outweighs the penalty where the gradient is above its mean."""
        total = g.abs().flatten(1).sum(1)
        no = torch.zeros_like(gap, dtype=torch.bool)
        c = known(w[0].numel() / total)
        unit = torch.full_like(gap, _unit(problem.threat.box))
        rate = unit * distance(problem, REACH * gap / total, math.inf)
        return cls(
            c, rate, no, no, problem.eps.clone(), torch.zeros_like(gap), torch.full_like(gap, math.inf), w, c, unit
        )

    def penalty(self, r: Tensor) -> tuple[Tensor, Tensor]:
        beyond = r.abs() - per_row(self.tau, r)
        return beyond.clamp_min(0.0).flatten(1).sum(1), r.sign() * (beyond > 0)

    def saw(self, problem: Problem, view: View, g: Tensor, w: Tensor, x: Tensor) -> Self:
        size = problem.threat.region.measure(x, problem.x0)
        better = view.met & (size < self.size)
        best, base = torch.where(better, size, self.size), torch.where(per_row(better, w), w, self.base)
        return replace(self, size=best, base=base, won=self.won | (view.met & (size <= self.tau)))

    def over(self) -> Tensor:
        return self.won

    def next_round(self, ended: Tensor, w: Tensor) -> tuple[Self, Tensor]:
        failed = ended & ~self.won
        heavier = failed & (self.c < self.least * 2**TRIES)
        too_low = failed & ~heavier & self.size.isfinite()
        floor = torch.where(too_low, torch.maximum(self.floor, self.tau), self.floor)
        lower = torch.where(floor > 0, (floor + self.size) / 2, SHRINK * self.size)
        tau = torch.where(ended & (self.won | too_low), lower, self.tau)
        c = torch.where(heavier, 2 * self.c, torch.where(too_low, self.least, self.c))
        rate = torch.where(
            failed & self.size.isinf(), torch.minimum(2 * self.rate, self.rate.clamp_min(FARTHEST)), self.rate
        )
        rate = torch.where(tau.isfinite(), STEP * tau * self.unit, rate)
        w = torch.where(per_row(too_low, w), self.base, w)
        finished = self.size - floor < CLOSE * self.size
        return replace(self, c=c, rate=rate, won=self.won & ~ended, finished=finished, tau=tau, floor=floor), w


@dataclass
class Elimination(Round):
    """L0: minimise |r|^2 + c f(x) over the ``free`` [B, P] positions, and drop those that matter least, round after round.

    ``size`` [B] positions sufficed: the ``proven`` [B, P] ones, with the variable ``base`` [B, ...], where each was ``worth``
    [B, P] logits; the next round drops ``share`` [B] of them. ``start`` [B] is the first step length.
    Where ``enough`` [B] positions are allowed, all others are dropped at first.
    """

    free: Tensor
    proven: Tensor
    worth: Tensor
    size: Tensor
    share: Tensor
    base: Tensor
    start: Tensor
    enough: Tensor

    @classmethod
    def first(cls, problem: Problem, gap: Tensor, g: Tensor, w: Tensor) -> Self:
        norm = g.flatten(1).norm(dim=1)
        no = torch.zeros_like(gap, dtype=torch.bool)
        far = distance(problem, gap / norm, 2)
        rate = far * _unit(problem.threat.box) / math.sqrt(w[0].numel())
        every = torch.ones_like(_positions(problem, w)[:, 0], dtype=torch.bool)
        inf = torch.full_like(gap, math.inf)
        share = torch.where(problem.eps.isfinite(), 1.0, inf.new_tensor(DROP))
        return cls(known(20 * far / norm), rate, no, no, every, every, every.to(w), inf, share, w, rate, problem.eps)

    def saw(self, problem: Problem, view: View, g: Tensor, w: Tensor, x: Tensor) -> Self:
        size = problem.threat.region.measure(x, problem.x0)
        better = view.met & (size < self.size)
        rows = better.unsqueeze(1)
        return replace(
            self,
            size=torch.where(better, size, self.size),
            base=torch.where(per_row(better, w), w, self.base),
            proven=torch.where(rows, _positions(problem, x != problem.x0).any(1), self.proven),
            worth=torch.where(rows, _positions(problem, g * (x - problem.x0)).sum(1), self.worth),
            won=self.won | better,
        )

    def over(self) -> Tensor:
        return self.won

    def next_round(self, ended: Tensor, w: Tensor) -> tuple[Self, Tensor]:
        known = self.size.isfinite()
        failed = ended & ~self.won
        least = (self.share * self.size).floor() <= 1  # it was a single position that could not be missed
        share = torch.where(failed & known, self.share / 2, self.share)
        keep = self.size - (share * self.size).floor().clamp_min(1.0)
        keep = torch.where(self.enough.isfinite(), torch.maximum(keep, self.enough), keep)
        rank = self.worth.masked_fill(~self.proven, -math.inf).argsort(dim=1, descending=True, stable=True)
        chosen = torch.arange(rank.shape[1], device=w.device) < keep.unsqueeze(1)
        free = torch.zeros_like(chosen).scatter_(1, rank, chosen)
        free = torch.where((ended & known).unsqueeze(1), free, self.free)
        c = torch.where(failed, 4 * self.c, self.c)
        part = (self.free.shape[1] / keep.clamp_min(1.0)).sqrt()  # fewer positions have farther to go
        rate = torch.where(ended, torch.where(known, part * self.start, 2 * self.rate), self.rate)
        rate = torch.minimum(rate, self.start.clamp_min(FARTHEST))
        w = torch.where(per_row(ended & known, w), self.base, w)
        finished = self.finished | (failed & known & least)
        won = self.won & ~ended
        return replace(self, c=c, rate=rate, won=won, finished=finished, free=free, share=share), w

    def place(self, x: Tensor, x0: Tensor) -> Tensor:
        width = x0[0].numel() // self.free.shape[1]
        kept = self.free.unsqueeze(1).expand(-1, width, -1).reshape(x0.shape)
        return torch.where(kept, x, x0)


Search = Weight | Ceiling | Elimination


def search_of(problem: Problem) -> type[Weight] | type[Ceiling] | type[Elimination]:
    """The search for the region of a threat."""
    region = problem.threat.region
    return Elimination if isinstance(region, L0) else Ceiling if isinstance(region, Linf) else Weight


def _positions(problem: Problem, v: Tensor) -> Tensor:
    """[B, channels, positions]: what L0 counts together stands in dimension 1."""
    region = problem.threat.region
    if not isinstance(region, L0):
        raise ThreatError(f"Positions are dropped under an L0 threat; got {problem.threat}.")
    return region.positions(v)


def _unit(box: Box) -> float:
    """The variable's length of an input unit, in the middle of the box."""
    return 1.0 if math.isinf(box[1] - box[0]) else 2 / (box[1] - box[0])


def distance(problem: Problem, linear: Tensor, norm: float) -> Tensor:
    """[B]: how far the boundary is by its linearisation, or the first point from the clean input, in that norm."""
    away = torch.linalg.vector_norm((problem.begin() - problem.x0).flatten(1), norm, dim=1)
    return torch.maximum(known(linear), away)


def known(value: Tensor) -> Tensor:
    """Zero where a gradient of zero made it infinite or no number."""
    return torch.nan_to_num(value, nan=0.0, posinf=0.0)


def shortfall(problem: Problem, view: View) -> Tensor:
    """The paper's f6: by how many logits the goal is missed, [B]; zero where it is met."""
    gap = problem.goal.confidence + 2 * rounding(view.logits) - view.value
    return torch.nan_to_num(gap.clamp_min(0.0), nan=0.0, posinf=0.0).masked_fill(view.met, 0.0)


def stalled(loss: Tensor, checked: Tensor, age: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """[B] bool: has a tenth of a round hardly brought its lowest loss down; and that loss when last checked."""
    check = age % max(1, inner // 10) == 0
    return check & (loss > STALLED * checked), torch.where(check, loss, checked)
