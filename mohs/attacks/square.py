"""Square: random search with squares of constant change, by the model's scores alone."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent, check_share
from mohs.look import Look
from mohs.objectives import Objective, margin
from mohs.problem import Goal, Problem
from mohs.regions import Linf, Lp, per_row
from mohs.threat import Access

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After how many of 10,000 steps the area of the squares is halved."""

TILES = 5
"""The first change in L2 and L1 is a grid of that many bumps each way."""

ROUNDS = 3
"""How often a change is scaled to the whole radius and cut by the box: more gain next to nothing."""


BLOCK = 32
"""Steps whose random numbers are drawn together: a draw costs as much for many numbers as for a few."""


@dataclass
class SquareState(State):
    """``x`` is the proposal to look at, ``best`` [B, ...] what it has to beat, ``value`` [B] the objective there; ``draws``
    [B, BLOCK, n]: random numbers of the next steps."""

    best: Tensor | None = None
    value: Tensor | None = None
    draws: Tensor | None = None


@dataclass(frozen=True)
class Square:
    """Random search: change one square at a random place, keep the change where it brings the goal nearer.

        Linf:   x' = best, but x0 + eps * sign inside the square, sign in {-1, 1} per channel
        L2, L1: x' = best, but the change of two windows is moved into one of them and reshaped by a bump
        best = x' if J(x') > J(best)

    Every proposal lies on the border of the ball, and the squares shrink as the search goes on. It asks for scores only, so
    masked gradients do not stop it: use it after a gradient attack (``start=``) to see whether gradients hid anything, or
    alone against a black box. It needs thousands of queries where a gradient needs tens, and it is blind to changes that
    no square resembles.

    Args:
        steps: queries after the first.
        share: of the image's area that the first squares cover (the paper's p).
        random_start: begin at vertical stripes of -eps and eps (L2, L1: a grid of bumps), else at the clean input; the
            caller's points (``start=``) come before both.
        objective: what to climb.

    Cost: at most steps + 1 forwards (queries) per restart, no backwards; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(Square(steps=50), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "linf:0.11")
    >>> bool(out.success), int(out.backwards)
    (True, 0)

    **Differs from the paper**: each row draws its own squares; squares reach the last row and column (the public code
    leaves them out); a proposal that would change nothing takes the opposite signs instead, so that no query is wasted;
    the likelihood is not used for targets unless it is asked for; a row of numbers [D] takes segments, an image that is not
    square rectangles of the same area; in L2 and L1 the length that the box cuts off is given to the rest of the change, and the
    window to be emptied is drawn where there is something to move (L2: every other time).
    Where logits are not granted, the logarithms of the probabilities stand in for them: their margin is the same.
    **Source**: M. Andriushchenko, F. Croce, N. Flammarion, M. Hein, "Square attack: a query-efficient black-box
    adversarial attack via random search", ECCV 2020, algorithms 1 to 3; L1 as in F. Croce, M. Hein, "Mind the box:
    l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021, section 5.
    """

    steps: int = 5000
    share: float = 0.8
    random_start: bool = True
    objective: Objective = margin
    needs: ClassVar[Access] = Access.SCORE
    finite: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        check_ascent(self)
        check_share(self, "share")

    def init(self, problem: Problem) -> SquareState:
        """Where the caller says, at stripes, or at the clean input."""
        if problem.warm is not None or not self.random_start:
            x = problem.begin()
        else:
            x = stripes(problem) if isinstance(problem.threat.region, Linf) else bumps(problem)
        return SquareState(x, None, x.clone(), torch.full_like(problem.eps, -math.inf))

    def step(self, problem: Problem, state: SquareState, k: int) -> SquareState:
        """Look at the proposal, keep the better point, and propose the next."""
        assert state.best is not None
        assert state.value is not None
        look = problem.look(state.x, self.objective)
        value = scored(look, self.objective, problem.goal)
        better = value > state.value
        best = torch.where(per_row(better, state.x), state.x, state.best)
        area = self.share * 0.5 ** sum(k * 10_000 // self.steps > late for late in HALVINGS)
        propose, numbers = (square, 2) if isinstance(problem.threat.region, Linf) else (move, 5)
        draws = state.draws
        if draws is None or k % BLOCK == 0:
            numbers += image(problem.x0).shape[1]
            draws = streams.uniform(problem.key, (BLOCK, numbers), draw=2 + k // BLOCK)
        x = propose(problem, best, area, draws[:, k % BLOCK])
        return SquareState(x, None, best, torch.where(better, value, state.value), draws)


def scored(look: Look, objective: Objective, goal: Goal) -> Tensor:
    """The objective at a look that may show no more than probabilities, [B]: their logarithms are logits up to a shift per row."""
    if look.access >= Access.LOGIT:
        return look.value
    tiny = torch.finfo(look.probabilities.dtype).tiny
    return objective(look.probabilities.clamp_min(tiny).log(), goal)[0]


def square(problem: Problem, best: Tensor, area: float, u: Tensor) -> Tensor:
    """``best``, but at distance eps from the clean input inside one square; every channel has a sign of its own.

    ``u`` [B, 2 + channels]: random numbers of [0, 1).
    """
    x = image(best)
    height, width = sides(area, x)
    place = pixels(anywhere(u[:, :2], height, width, x), height, width, x)
    clean, old = image(problem.x0).flatten(2).gather(2, place), x.flatten(2).gather(2, place)
    change = per_row(problem.eps, clean) * signs(u[:, 2:], x)
    new = (clean + change).clamp_(*problem.threat.box)
    idle = (new == old).flatten(1).all(1)
    new = torch.where(per_row(idle, new), clean - change, new).clamp_(*problem.threat.box)
    return x.flatten(2).scatter(2, place, new).view_as(best)


def move(problem: Problem, best: Tensor, area: float, u: Tensor) -> Tensor:
    """``best``, but what two windows hold of the change is gathered in the first, reshaped by a bump of random sign.

    The second window, which is emptied, stands around a changed pixel (L1), or does so every other time (L2). ``u`` [B, 5 +
    channels]: random numbers of [0, 1).
    """
    p, x0, x = _order(problem), image(problem.x0), image(best)
    channels, change = x.shape[1], (x - x0).flatten(2)
    height, width = (
        min(max(side, 3) // 2 * 2 + 1, whole) for side, whole in zip(sides(area, x), x.shape[2:], strict=True)
    )
    first = pixels(anywhere(u[:, :2], height, width, x), height, width, x)
    loaded = around(change, u[:, 2], height, width, x)
    random = anywhere(torch.stack([u[:, 2], (u[:, 3] * p - 1) / max(p - 1, 1)], 1).clamp_min_(0.0), height, width, x)
    second = pixels(torch.where(u[:, 3:4] * p < 1, loaded, random), height, width, x)
    free = (per_row(problem.eps**p, change) - length(change, p).pow_(p).sum(1, keepdim=True)).clamp_min_(0.0) / channels

    tiny, nothing = torch.finfo(x.dtype).tiny, torch.zeros_like(first, dtype=x.dtype)
    old = change.gather(2, first)
    rest = change.scatter(2, first, nothing)
    held = length(old, p)
    budget = (held**p + length(rest.gather(2, second), p).pow_(p) + free).pow_(1 / p)
    bump = pattern(height, width, p, x).flatten(1)[(u[:, 4] < 0.5).long()].unsqueeze(1)
    new = bump * signs(u[:, 5:], x) + old / held.clamp_min(tiny)
    new *= budget / length(new, p).clamp_min_(tiny)
    return fill(problem, rest.scatter_(2, second, nothing).scatter_(2, first, new).view_as(best))


def stripes(problem: Problem) -> Tensor:
    """Columns at x0 + eps or x0 - eps, a random sign per column and channel."""
    x = image(problem.x0)
    u = streams.uniform(problem.key, (x.shape[1], x.shape[3]))
    change = per_row(problem.eps, x) * torch.where(u < 0.5, -1.0, 1.0).to(x.dtype).unsqueeze(2)
    return (x + change).clamp_(*problem.threat.box).view_as(problem.x0)


def bumps(problem: Problem) -> Tensor:
    """A grid of bumps of random sign and orientation, on the border of the ball."""
    x, p = image(problem.x0), _order(problem)
    rows, channels, height, width = x.shape
    tall, wide = max(1, height // TILES), max(1, width // TILES)
    down, across = height // tall, width // wide
    u = streams.uniform(problem.key, (1 + channels, down, across))
    tiles = pattern(tall, wide, p, x)[(u[:, 0] < 0.5).long()].unsqueeze(1)  # [B, 1, down, across, tall, wide]
    tiles = tiles * torch.where(u[:, 1:] < 0.5, -1.0, 1.0).to(x.dtype)[..., None, None]
    grid = tiles.transpose(3, 4).reshape(rows, channels, down * tall, across * wide)
    top, left = (height - down * tall) // 2, (width - across * wide) // 2
    edges = (left, width - across * wide - left, top, height - down * tall - top)
    return fill(problem, torch.nn.functional.pad(grid, edges).view_as(problem.x0))


def _order(problem: Problem) -> float:
    region = problem.threat.region
    return region.p if isinstance(region, Lp) else 0.0


def fill(problem: Problem, change: Tensor) -> Tensor:
    """The clean input plus ``change``, as long as eps allows; what the box cuts off is given to the rest."""
    region, x0 = problem.threat.region, problem.x0
    for _ in range(ROUNDS):
        size = region.measure(change, torch.zeros_like(change))
        # where the box has cut off all of it there is nothing to stretch
        factor = torch.where(size > 0, problem.eps / size.clamp_min(torch.finfo(x0.dtype).tiny), 0.0)
        x = (x0 + change * per_row(factor, x0)).clamp_(*problem.threat.box)
        change = x - x0
    return problem.project(x)


def image(x: Tensor) -> Tensor:
    """[B, channels, height, width]: numbers in a row are one line of pixels, [B, H, W] one channel, frames lie below each other."""
    if x.dim() == 2:
        return x.view(len(x), 1, 1, -1)
    return x.unsqueeze(1) if x.dim() == 3 else x.reshape(len(x), x.shape[1], -1, x.shape[-1])


def sides(area: float, x: Tensor) -> tuple[int, int]:
    """(height, width) of the square that covers that share of the image; a rectangle where the image is too low for it."""
    height, width = x.shape[2:]
    pixels = area * height * width
    side = max(1, round(math.sqrt(pixels)))
    if side > height:
        return height, min(width, max(1, round(pixels / height)))
    return (side, side) if side <= width else (min(height, max(1, round(pixels / width))), width)


def anywhere(u: Tensor, height: int, width: int, x: Tensor) -> Tensor:
    """[B, 2]: the upper left corner of a window; every place is equally likely, the last row and column too."""
    return torch.stack([(u[:, 0] * (x.shape[2] - height + 1)).long(), (u[:, 1] * (x.shape[3] - width + 1)).long()], 1)


def around(change: Tensor, u: Tensor, height: int, width: int, x: Tensor) -> Tensor:
    """[B, 2]: the corner of a window around one pixel, drawn in proportion to its change."""
    mass = change.abs().sum(1).cumsum(1)
    pixel = torch.searchsorted(mass, u.unsqueeze(1) * mass[:, -1:], right=True).squeeze(1).clamp_max_(mass.shape[1] - 1)
    top = (pixel // x.shape[3] - height // 2).clamp_(0, x.shape[2] - height)
    return torch.stack([top, (pixel % x.shape[3] - width // 2).clamp_(0, x.shape[3] - width)], 1)


def pixels(corner: Tensor, height: int, width: int, x: Tensor) -> Tensor:
    """[B, channels, height * width]: where the pixels of a window stand in the flat image."""
    first = corner[:, :1] * x.shape[3] + corner[:, 1:]
    return (first + _window(height, width, x.shape[3], x.device)).unsqueeze(1).expand(-1, x.shape[1], -1)


@functools.lru_cache(maxsize=64)
def _window(height: int, width: int, line: int, device: torch.device) -> Tensor:
    """Where the pixels of a window stand in an image with lines of that length, from its corner."""
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    return (row.unsqueeze(1) * line + column).flatten()


def signs(u: Tensor, x: Tensor) -> Tensor:
    """[B, channels, 1]: -1 or 1."""
    return torch.where(u < 0.5, -1.0, 1.0).to(x.dtype).unsqueeze(2)


def length(v: Tensor, p: float) -> Tensor:
    """p-norm of each channel, [B, channels, 1]."""
    return torch.linalg.vector_norm(v, p, dim=2, keepdim=True)


def pattern(height: int, width: int, p: float, like: Tensor) -> Tensor:
    """[2, height, width]: a bump and a hollow side by side or one above the other, of unit p-norm."""
    return _pattern(height, width, p).to(like)


@functools.lru_cache(maxsize=64)
def _pattern(height: int, width: int, p: float) -> Tensor:
    upright, lying = _halves(height, width, p), _halves(width, height, p).T
    return torch.stack([upright if height > 1 else lying, lying if width > 1 else upright])


def _halves(height: int, width: int, p: float) -> Tensor:
    upper = height // 2
    both = torch.cat([_bump(upper, width, p), -_bump(height - upper, width, p)])
    return both / torch.linalg.vector_norm(both, p)


def _bump(height: int, width: int, p: float) -> Tensor:
    """Nested rectangles around the middle, the k-th of height 1 / k^2 (L1: 1 / k^4) [paper: equation 2]."""
    rows = (torch.arange(height) - height // 2).abs().unsqueeze(1)
    columns = (torch.arange(width) - width // 2).abs().unsqueeze(0)
    steps = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** (-2 if p > 1 else -4)
    return steps.flip(0).cumsum(0).flip(0)[torch.maximum(rows, columns)]
