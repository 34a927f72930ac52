"""The Boundary attack: a random walk along the boundary, by the model's answers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs._geometry import per_row
from mohs.attacks._base import State
from mohs.attacks._decision import answers_alone, blend, start, through
from mohs.attacks._settings import check_positive, check_whole
from mohs.attacks._smallest import unit
from mohs.problem import Problem
from mohs.threat import Access

START, SEARCH, SPHERE, STEP = range(4)
"""What a row's next look is for: a wrong answer anywhere; the boundary between it and the clean input; a step to the side at the
same distance; that step and one towards the clean input."""
BISECTIONS = 10
"""Looks on the line between the first wrong answer and the clean input."""
EVERY = 10
"""One in so many steps to the side is looked at by itself, so that its length can be set."""
SPHERES, STEPS = 10, 30
"""Looks after which the length of the steps to the side, and of those inwards, is set anew."""
FACTOR = 1.5
"""By how much."""


@dataclass(kw_only=True)
class BoundaryState(State):
    """``x``: the next point to look at. ``phase`` [B]: what for. ``kept`` [B, ...]: the nearest point with the wrong answer, ``far``
    [B] its distance; ``low``, ``high`` [B]: shares of ``far`` between which the answer changes; ``turn`` [B]: starts, bisections or
    steps so far; ``planned`` [B, ...]: the step inwards that follows a look to the side; ``side``, ``inwards`` [B]: lengths of
    both, in shares of ``far``; ``looks``, ``wins`` [B, 2]: of either kind, since its length was set."""

    phase: Tensor
    kept: Tensor
    far: Tensor
    low: Tensor
    high: Tensor
    turn: Tensor
    planned: Tensor
    side: Tensor
    inwards: Tensor
    looks: Tensor
    wins: Tensor


@dataclass(frozen=True)
class Boundary:
    """Walks along the boundary in random directions and comes a little nearer with each step that stays on the wrong side.

        x~ = x0 + (x + side * d * u - x0) * d / ||x + side * d * u - x0||,  u random, unit, orthogonal to x - x0,  d = ||x - x0||
        x  = x~ + inwards * d * (x0 - x~) / ||x0 - x~||   if the answer there is still wrong

    Both lengths follow the boundary: steps to the side should stay wrong about half of the time, steps inwards about a fifth of it.
    The first attack that needed answers alone; HopSkipJump comes as near with fewer queries, and this one makes fewer
    assumptions: it never estimates a direction, so masked or noisy surroundings of the boundary do not mislead it.

    A step is one query. At a finite radius a row ends once it is inside; a start may lie outside.

    Args:
        steps: queries after the first; the paper's curves go to a million, 2,000 are few.
        side: first length of the steps to the side, in shares of the distance.
        inwards: first length of the steps inwards, in shares of the distance.

    Raises:
        UsageError: a ``confidence`` above 0, which answers do not show.

    Cost: at most steps + 1 forwards (queries) per restart, no backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(Boundary(steps=600), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 2), int(out.backwards)  # exactly 0.2 / sqrt(2)
    (0.14, 0)

    **Differs from the paper**: ten bisections between the first wrong answer and the clean input come before the walk. One step
    to the side in ten is looked at by itself; its length is set by ten such looks, that of the steps inwards by thirty, up by
    half above a share of wrong answers of 1/2 and 1/4, down by a third below 1/5 and 1/10. Each row of a batch is at its own step,
    with lengths of its own.
    **Source**: W. Brendel, J. Rauber, M. Bethge, "Decision-based adversarial attacks: reliable attacks against black-box machine
    learning models", ICLR 2018, algorithm 1 and section 2.
    """

    steps: int = 5000
    side: float = 0.01
    inwards: float = 0.01
    needs: ClassVar[Access] = Access.LABEL
    outside: ClassVar[bool] = True
    finite: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_positive(self, "side", "inwards")

    def init(self, problem: Problem) -> BoundaryState:
        """At the clean inputs: those that are wrong already need no change."""
        answers_alone(problem, "Boundary")
        x, zero, none = problem.x0.clone(), torch.zeros_like(problem.eps), torch.zeros_like(problem.goal.label)
        return BoundaryState(
            x=x, phase=none, kept=x.clone(), far=zero, low=zero.clone(), high=zero.clone(), turn=none.clone(), planned=x.clone(),
            side=zero + self.side, inwards=zero + self.inwards, looks=zero.new_zeros(len(x), 2), wins=zero.new_zeros(len(x), 2),
        )  # fmt: skip

    def step(self, problem: Problem, state: BoundaryState, k: int) -> BoundaryState:
        """Look at the point, and choose the next one by what came of it."""
        wrong = problem.goal.reached(problem.look(state.x).label)
        s = self._searched(problem, state, wrong)
        sphere, stepped = state.phase == SPHERE, state.phase == STEP
        s = self._counted(s, wrong, torch.stack([sphere, stepped], 1))
        nearer = stepped & wrong
        kept = torch.where(per_row(nearer, s.x), s.x, s.kept)
        far = torch.where(nearer, problem.threat.region.measure(s.x, problem.x0), s.far)
        s = replace(s, kept=kept, far=far, turn=s.turn + stepped)
        return replace(self._next(problem, s, k, sphere), done=through(problem))

    @staticmethod
    def _searched(problem: Problem, s: BoundaryState, wrong: Tensor) -> BoundaryState:
        """The first wrong answer, and the way between it and the clean input."""
        starting, searching = s.phase == START, s.phase == SEARCH
        if not bool((starting | searching).any()):
            return s
        found = starting & wrong
        middle = (s.low + s.high) / 2
        low = torch.where(searching & ~wrong, middle, s.low).masked_fill(found, 0.0)
        high = torch.where(searching & wrong, middle, s.high).masked_fill(found, 1.0)
        kept = torch.where(per_row(found, s.x), s.x, s.kept)
        far = torch.where(found, problem.threat.region.measure(s.x, problem.x0), s.far)
        turn = (s.turn + (starting | searching)).masked_fill(found, 0)
        over = searching & (turn >= BISECTIONS)
        share = torch.where(over, high, 1.0)
        kept = torch.where(per_row(over, kept), blend(problem, kept, share * far), kept)
        phase = s.phase.masked_fill(found, SEARCH).masked_fill(over, STEP)
        return replace(
            s, phase=phase, kept=kept, far=share * far, low=low, high=high, turn=turn.masked_fill(over, 0)
        )  # fmt: skip

    @staticmethod
    def _counted(s: BoundaryState, wrong: Tensor, kinds: Tensor) -> BoundaryState:
        """Looks and wrong answers of both kinds [B, 2], and lengths set by them."""
        looks, wins = s.looks + kinds, s.wins + kinds * wrong.unsqueeze(1)
        full = looks >= looks.new_tensor([SPHERES, STEPS])
        share = wins / looks.clamp_min(1)
        more = full & (share > looks.new_tensor([0.5, 0.25]))
        less = full & (share < looks.new_tensor([0.2, 0.1]))
        factor = torch.where(more, FACTOR, torch.where(less, 1 / FACTOR, 1.0))
        return replace(
            s, looks=looks.masked_fill(full, 0.0), wins=wins.masked_fill(full, 0.0),
            side=(s.side * factor[:, 0]).clamp_max(1.0), inwards=(s.inwards * factor[:, 1]).clamp_max(0.5),
        )  # fmt: skip

    @staticmethod
    def _next(problem: Problem, s: BoundaryState, k: int, sphere: Tensor) -> BoundaryState:
        """The next point to look at; after a look to the side (``sphere``) it is the step that was planned with it."""
        x, phase = s.x, s.phase
        if bool((phase == START).any()):
            x = torch.where(per_row(phase == START, x), start(problem, s.turn, k), x)
        if bool((phase == SEARCH).any()):
            middle = blend(problem, s.kept, (s.low + s.high) / 2 * s.far)
            x = torch.where(per_row(phase == SEARCH, x), middle, x)
        walking = phase >= SPHERE
        if not bool(walking.any()):
            return replace(s, x=x.clamp(*problem.threat.box))
        box, x0 = problem.threat.box, problem.x0
        u = streams.normal(problem.key, tuple(x.shape[1:]), draw=3 + 2 * k, dtype=x.dtype)
        out = unit(s.kept - x0)
        u = unit(u - per_row((u * out).flatten(1).sum(1), u) * out)
        aside = (x0 + per_row(s.far, x) * unit(s.kept + per_row(s.side * s.far, u) * u - x0)).clamp(*box)
        gap = x0 - aside
        # what the box took of the distance needs no step any more
        length = (s.inwards * s.far + torch.linalg.vector_norm(gap.flatten(1), dim=1) - s.far).clamp_min(0)
        nearer = (aside + per_row(length, x) * unit(gap)).clamp(*box)
        look = walking & ~sphere & (s.turn % EVERY == 0)
        planned = torch.where(per_row(sphere, x), s.planned, nearer)
        x = torch.where(per_row(walking, x), torch.where(per_row(look, x), aside, planned), x)
        phase = torch.where(walking, torch.where(look, SPHERE, STEP), phase)
        return replace(s, x=x.clamp(*box), phase=phase, planned=torch.where(per_row(walking, x), planned, s.planned))
