"""HopSkipJump: along the boundary, by the model's answers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs.attacks._base import State
from mohs.attacks._decision import answers_alone, blend, start, through, tolerance
from mohs.attacks._settings import check_whole
from mohs.attacks._smallest import unit
from mohs.problem import Problem
from mohs.regions import Linf, per_row
from mohs.threat import Access

START, SEARCH, VOTE, LEAP = range(4)
"""What a row's next look is for: a wrong answer anywhere; the boundary between it and the clean input; the side on which a point
near the boundary lies; a wrong answer further along the boundary. Rows differ in what each takes, so each row is at its own."""


@dataclass(kw_only=True)
class HopSkipJumpState(State):
    """``x``: the next point to look at. ``phase`` [B]: what for. ``kept`` [B, ...]: a point with the wrong answer, ``far`` [B] its
    size; ``low``, ``high`` [B]: shares of ``far`` between which the answer changes; ``turn`` [B]: iterations so far, or starts
    tried; ``count``, ``votes`` [B], ``drawn``, ``voted`` [B, ...]: how many votes, their sum, the sum of the directions, and that of
    votes times directions, in the end the direction to leap in; ``delta`` [B]: how far from ``kept`` is voted, Euclidean;
    ``leap`` [B]: how far to leap."""

    phase: Tensor
    kept: Tensor
    far: Tensor
    low: Tensor
    high: Tensor
    turn: Tensor
    count: Tensor
    votes: Tensor
    drawn: Tensor
    voted: Tensor
    delta: Tensor
    leap: Tensor


@dataclass(frozen=True)
class HopSkipJump:
    """Walks along the boundary towards the clean input; all it asks of the model is its answer.

        x_1 = Bin-Search(x~_0, x0), x~_0 any point with the wrong answer
        B_t = votes * sqrt(t),  phi_b = 1 if the answer at x_t + delta_t u_b is wrong, else -1,  u_b uniform on the sphere
        v_t = sum (phi_b - mean phi) u_b;  Linf: its sign, L2: over its norm
        x~_t = x_t + leap v_t,  leap = ||x_t - x0|| / sqrt(t), halved until the answer is wrong
        x_(t+1) = Bin-Search(x~_t, x0)

    Where only labels are shown it is the attack to take; after others it tells whether gradients or scores hide something,
    because it looks at neither. It takes thousands of queries to come near what gradients find in tens, is poor at finding a
    start of a rare class (targets want ``start=``, an input of that class), and learns nothing where answers are random.

    A step is one query. At a finite radius a row ends once it is inside; a start may lie outside.

    Args:
        steps: queries after the first.
        votes: queries of the first estimate of the normal (the paper's B_0).

    Raises:
        UsageError: a ``confidence`` above 0, which answers do not show.

    Cost: at most steps + 1 forwards (queries) per restart, no backwards; about 10 to 20 queries of each iteration go into
    the search, the rest into votes.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(HopSkipJump(steps=600), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 2), int(out.backwards)  # exactly 0.2 / sqrt(2)
    (0.14, 0)

    **Differs from the paper**: the first look is at the clean input. A start that the caller gives (an example of another
    class) is looked at next, then points at twice, four times, ... its distance; random starts vary in brightness and contrast,
    as many nets give all plain noise one answer. The search ends at a share of d^(-3/2) of the distance in Linf too, and delta
    is the Euclidean distance over d, whichever the norm: the paper's are so small in Linf that float32 does not hold them.
    Directions are normal in Linf too. A leap shorter than the search's tolerance ends in a new estimate. The rows of a batch
    are at different stages, so that none waits for another. Aims are not used: a label does not rank the others.
    **Source**: J. Chen, M. I. Jordan, M. J. Wainwright, "HopSkipJumpAttack: a query-efficient decision-based attack", IEEE
    S&P 2020, algorithms 1 and 2, equations 9, 11 and 16.
    """

    steps: int = 5000
    votes: int = 100
    needs: ClassVar[Access] = Access.LABEL
    outside: ClassVar[bool] = True
    finite: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "votes")

    def init(self, problem: Problem) -> HopSkipJumpState:
        """At the clean inputs: those that are wrong already need no change."""
        answers_alone(problem, "HopSkipJump")
        x, zero, none = problem.x0.clone(), torch.zeros_like(problem.eps), torch.zeros_like(problem.goal.label)
        return HopSkipJumpState(
            x=x, phase=none, kept=x.clone(), far=zero, low=zero.clone(), high=zero.clone(), turn=none.clone(), count=none.clone(),
            votes=zero.clone(), drawn=torch.zeros_like(x), voted=torch.zeros_like(x), delta=zero.clone(), leap=zero.clone(),
        )  # fmt: skip

    def step(self, problem: Problem, state: HopSkipJumpState, k: int) -> HopSkipJumpState:
        """Look at the point, go on to the next stage where one is through, and choose the next point."""
        wrong = problem.goal.reached(problem.look(state.x).label)
        phase = state.phase
        s = self._counted(state, wrong, phase == VOTE)
        s = self._turned(problem, s, (phase == VOTE) & (s.count >= self.votes * s.turn.sqrt()))
        s = self._narrowed(s, wrong, phase == SEARCH)
        s = self._found(problem, s, ~wrong, (phase == START) | (phase == LEAP))
        width = tolerance(problem)
        s = self._reached(problem, s, (s.phase == SEARCH) & (s.high - s.low <= width))
        s = self._reached(problem, s, (s.phase == LEAP) & (s.leap <= width * s.far))
        return replace(s, x=self._next(problem, s, k), done=through(problem))

    @staticmethod
    def _counted(s: HopSkipJumpState, wrong: Tensor, at: Tensor) -> HopSkipJumpState:
        """A vote for a direction, or against it."""
        if not bool(at.any()):
            return s
        u = (s.x - s.kept) * per_row(at / s.delta.clamp_min(torch.finfo(s.x.dtype).tiny), s.x)  # as the box left it
        vote = torch.where(wrong, 1.0, -1.0).to(u) * at
        return replace(
            s, count=s.count + at, votes=s.votes + vote, drawn=s.drawn + u, voted=s.voted + per_row(vote, u) * u
        )

    @staticmethod
    def _turned(problem: Problem, s: HopSkipJumpState, at: Tensor) -> HopSkipJumpState:
        """All votes are in: where to leap, and how far."""
        if not bool(at.any()):
            return s
        mean = s.votes / s.count.clamp_min(1)
        # where all agree, what they agree on is all that is known
        mean = torch.where(mean.abs() < 1, mean, 0.0)
        v = s.voted - per_row(mean, s.x) * s.drawn
        v = v.sign() if isinstance(problem.threat.region, Linf) else unit(v)
        leap = s.far / s.turn.clamp_min(1).sqrt()
        return replace(
            s, phase=torch.where(at, LEAP, s.phase), voted=torch.where(per_row(at, v), v, s.voted),
            leap=torch.where(at, leap, s.leap),
        )  # fmt: skip

    @staticmethod
    def _narrowed(s: HopSkipJumpState, wrong: Tensor, at: Tensor) -> HopSkipJumpState:
        """Half of the way on which the answer changes."""
        if not bool(at.any()):
            return s
        middle = (s.low + s.high) / 2
        return replace(
            s, high=torch.where(at & wrong, middle, s.high), low=torch.where(at & ~wrong, middle, s.low)
        )  # fmt: skip

    @staticmethod
    def _found(problem: Problem, s: HopSkipJumpState, right: Tensor, at: Tensor) -> HopSkipJumpState:
        """A point with the wrong answer, between which and the clean input the boundary lies; else the next start, or half the leap."""
        if not bool(at.any()):
            return s
        here = at & ~right
        starting = at & right & (s.phase == START)
        return replace(
            s, phase=torch.where(here, SEARCH, s.phase), kept=torch.where(per_row(here, s.x), s.x, s.kept),
            far=torch.where(here, problem.threat.region.measure(s.x, problem.x0), s.far),
            low=s.low.masked_fill(here, 0.0), high=s.high.masked_fill(here, 1.0),
            turn=torch.where(here & (s.phase == START), 0, s.turn + starting), leap=torch.where(at & right, s.leap / 2, s.leap),
        )  # fmt: skip

    @staticmethod
    def _reached(problem: Problem, s: HopSkipJumpState, at: Tensor) -> HopSkipJumpState:
        """At the boundary: the next iteration begins with its votes."""
        if not bool(at.any()):
            return s
        share = torch.where(s.phase == SEARCH, s.high, 1.0)
        kept = torch.where(per_row(at, s.x), blend(problem, s.kept, share * s.far), s.kept)
        length = torch.linalg.vector_norm((kept - problem.x0).flatten(1), dim=1)
        many = per_row(at, s.x)
        return replace(
            s, phase=torch.where(at, VOTE, s.phase), kept=kept, far=torch.where(at, share * s.far, s.far), turn=s.turn + at,
            count=s.count.masked_fill(at, 0), votes=s.votes.masked_fill(at, 0.0), drawn=s.drawn.masked_fill(many, 0.0),
            voted=s.voted.masked_fill(many, 0.0), delta=torch.where(at, length / s.x[0].numel(), s.delta),
        )  # fmt: skip

    @staticmethod
    def _next(problem: Problem, s: HopSkipJumpState, k: int) -> Tensor:
        """The next point to look at, by what it is for."""
        x = s.x
        if bool((s.phase == START).any()):
            x = torch.where(per_row(s.phase == START, x), start(problem, s.turn, k), x)
        if bool((s.phase == SEARCH).any()):
            middle = blend(problem, s.kept, (s.low + s.high) / 2 * s.far)
            x = torch.where(per_row(s.phase == SEARCH, x), middle, x)
        if bool((s.phase == VOTE).any()):
            u = unit(streams.normal(problem.key, tuple(x.shape[1:]), draw=3 + 2 * k, dtype=x.dtype))
            x = torch.where(per_row(s.phase == VOTE, x), s.kept + per_row(s.delta, u) * u, x)
        if bool((s.phase == LEAP).any()):
            x = torch.where(per_row(s.phase == LEAP, x), s.kept + per_row(s.leap, x) * s.voted, x)
        return x.clamp(*problem.threat.box)
