"""PatchSearch: random search for a patch, its place and its colours, by the model's scores alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs._geometry import Box
from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent, check_share
from mohs.attacks.lavan import geometry
from mohs.attacks.square import HALVINGS, scored
from mohs.objectives import Objective, margin
from mohs.problem import Problem
from mohs.regions import Patch, per_row
from mohs.threat import Access

MOVES = 3
"""Every so many steps the patch is moved instead of painted."""
REACH = 0.25
"""Share of the free way that a move may go at least."""


@dataclass(kw_only=True)
class PatchSearchState(State):
    """``fill``, ``place``: content [B, C, H, W], from the upper left corner on, and first pixel [B, 2] of the proposal ``x``;
    ``best``, ``at``: those of the best patch so far, ``value`` [B] the objective there."""

    fill: Tensor
    place: Tensor
    best: Tensor
    at: Tensor
    value: Tensor


@dataclass(frozen=True)
class PatchSearch:
    """Paint one square of the patch, or move the patch, at random; keep the change where it brings the goal nearer.

        two steps of three: x' = best, but every channel at a random bound of the box inside one square of the patch
        every third step:   x' = best, its patch or the negative of it moved by up to reach pixels down and across
        best = x' if J(x') > J(best)

    Squares and moves shrink as the search goes on. It asks for scores only, so masked gradients do not stop it: use it where
    LaVAN finds nothing, or against a black box. It needs hundreds of queries where a gradient needs tens, stays at a place
    that no neighbour betters (give it restarts), and its colours are the corners of the box alone.

    Args:
        steps: queries after the first.
        share: of the patch's area that the first squares cover.
        random_start: begin with vertical stripes at a random place, else at the clean input; the caller's points (``start=``)
            come before both.
        objective: what to climb.

    Raises:
        ThreatError: a threat that is no patch, or an infinite box.

    Cost: at most steps + 1 forwards (queries) per restart, no backwards; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 2, bias=False))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0] * 9, [0.0] * 8 + [4.0]]))
    >>> out = mohs.attack(PatchSearch(steps=100), net, torch.full((1, 1, 3, 3), 0.4), torch.tensor([0]), "patch:2", restarts=9)
    >>> out.success.tolist(), int(out.backwards), float(out.size)
    ([True], 0, 2.0)

    **Differs from the paper**: the first patch is striped as in Square, the squares shrink as in Square, and a proposal that would
    change nothing takes the opposite colours; moves shrink with the squares, and every other one takes the patch's negative.
    **Source**: F. Croce, M. Andriushchenko, N. D. Singh, N. Flammarion, M. Hein, "Sparse-RS: a versatile framework for
    query-efficient sparse black-box adversarial attacks", AAAI 2022, section on image- and location-specific patches.
    """

    steps: int = 2000
    share: float = 0.4
    random_start: bool = True
    objective: Objective = margin
    needs: ClassVar[Access] = Access.SCORE
    finite: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("patch",)

    def __post_init__(self) -> None:
        check_ascent(self)
        check_share(self, "share")

    def init(self, problem: Problem) -> PatchSearchState:
        """Where the caller says, at stripes in a random window, or at the clean input."""
        region, x0 = geometry(problem), problem.x0
        region.finite(problem.threat.box)
        free = room(region, x0, problem.eps)
        if problem.warm is not None or not self.random_start:
            x = problem.begin()
            changed = (x != x0).any(1)
            first = torch.stack([changed.any(2).int().argmax(1), changed.any(1).int().argmax(1)], 1)
            place = torch.minimum(first, free)
            fill = moved(x, -place)
        else:
            u = streams.uniform(problem.key, (x0.shape[1], 1, x0.shape[3]))
            fill = bounds(u < 0.5, x0, problem.threat.box).expand_as(x0)
            place = (streams.uniform(problem.key, (2,), draw=1, dtype=torch.float64) * (free + 1)).long()
        if region.at is not None:
            corner = torch.tensor(region.at, device=x0.device).expand_as(place)
            fill = fill if self.random_start and problem.warm is None else moved(fill, place - corner)
            place = corner
        low_value = torch.full_like(problem.eps, -math.inf)
        return PatchSearchState(
            x=shown(problem, region, fill, place), fill=fill, place=place, best=fill.clone(), at=place.clone(), value=low_value
        )  # fmt: skip

    def step(self, problem: Problem, state: PatchSearchState, k: int) -> PatchSearchState:
        """Look at the proposal, keep the better patch, and propose the next."""
        region = geometry(problem)
        value = scored(problem.look(state.x, self.objective), self.objective, problem.goal)
        better = value > state.value
        best = torch.where(per_row(better, state.fill), state.fill, state.best)
        at = torch.where(better.unsqueeze(1), state.place, state.at)
        side = math.sqrt(self.share * 0.5 ** sum(k * 10_000 // self.steps > late for late in HALVINGS))
        u = streams.uniform(problem.key, (2 + best.shape[1],), draw=2 + k, dtype=torch.float64)
        if k % MOVES == MOVES - 1 and region.at is None:
            low, high = problem.threat.box
            # what helps in one place may harm in another: every other time the patch is moved as its negative, whose
            # values may round past the bounds
            fill = torch.where(per_row(u[:, 2] < 0.5, best), (low + high - best).clamp_(low, high), best)
            place = moved_place(problem, region, at, max(side, REACH), u)
        else:
            fill, place = painted(problem, region, best, side, u), at
        x = shown(problem, region, fill, place)
        return replace(
            state, x=x, fill=fill, place=place, best=best, at=at, value=torch.where(better, value, state.value)
        )


def painted(problem: Problem, region: Patch, best: Tensor, side: float, u: Tensor) -> Tensor:
    """``best``, but one square of ``side`` times the patch's side at random bounds of the box, every channel at its own."""
    inside = []
    for share, length, count in zip(u[:, :2].unbind(1), region.sides(best, problem.eps), best.shape[-2:], strict=True):
        width = (length * side).round().long().clamp_min_(1)
        first = (share * (length - width + 1).clamp_min(1)).long()
        away = torch.arange(count, device=best.device) - first.unsqueeze(1)
        inside.append((away >= 0) & (away < width.unsqueeze(1)))
    square = (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)
    dark = (u[:, 2:] < 0.5)[:, :, None, None]
    new = torch.where(square, bounds(dark, best, problem.threat.box), best)
    idle = (new == best).flatten(1).all(1)
    opposite = torch.where(square, bounds(~dark, best, problem.threat.box), best)
    return torch.where(per_row(idle, best), opposite, new)


def bounds(lower: Tensor, like: Tensor, box: Box) -> Tensor:
    """The lower bound of the box where ``lower`` says so, else the upper one, as exact as the precision of ``like`` has them."""
    return torch.where(lower, like.new_tensor(box[0]), like.new_tensor(box[1]))


def moved_place(problem: Problem, region: Patch, at: Tensor, side: float, u: Tensor) -> Tensor:
    """The first pixel of the window, up to ``side`` of the free way down and across from where it is."""
    free = room(region, problem.x0, problem.eps)
    reach = (free * side).ceil().long()
    step = (u[:, :2] * (2 * reach + 1)).long() - reach
    return torch.minimum((at + step).clamp_min_(0), free)


def room(region: Patch, x0: Tensor, eps: Tensor) -> Tensor:
    """[B, 2]: the last first pixel that leaves the window inside the image."""
    return torch.stack([n - side for n, side in zip(x0.shape[2:], region.sides(x0, eps), strict=True)], 1)


def moved(x: Tensor, by: Tensor) -> Tensor:
    """Images [B, C, H, W], each moved down and across by its ``by`` [B, 2]; what leaves comes in at the other side."""
    for axis, step in zip((2, 3), by.unbind(1), strict=True):
        count = x.shape[axis]
        index = (torch.arange(count, device=x.device) - step.unsqueeze(1)) % count
        x = x.gather(axis, index.view(len(x), 1, *((-1, 1) if axis == 2 else (1, -1))).expand_as(x))
    return x


def shown(problem: Problem, region: Patch, fill: Tensor, place: Tensor) -> Tensor:
    """The clean input with the patch at its place."""
    inside = region.window(place, problem.x0, problem.eps)
    return torch.where(inside, moved(fill, place), problem.x0)
