"""SparseFool: DeepFool's boundary, reached along few coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._settings import check_least, check_whole
from mohs.attacks._smallest import free
from mohs.attacks._sparse import geometry, least, tighten
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.regions import L1, L2, per_row
from mohs.target import rounding
from mohs.threat import Access


@dataclass(kw_only=True)
class SparseFoolState(State):
    """``sparse`` [B]: is the next point one of the linear solver? ``mean``, ``polished``: of the polish, as in JSMA."""

    sparse: Tensor
    mean: Tensor
    polished: Tensor


@dataclass(frozen=True)
class SparseFool:
    """Few changed features: DeepFool finds the boundary and its normal, a linear solver crosses it along few coordinates.

    From a sparse point x_i that does not meet the goal, beginning with x_i = x0:

        x_B = DeepFool_L2(x_i)                             steps of -margin / ||w||_2 along w, until the goal is met
        w = grad margin(x_B)
        x_(i+1) = x0 + argmin ||r||_1  with  <w, r> = control * <w, x_B - x0>,  x0 + r in the box

    The minimum fills coordinates in order of |w|, each to its bound. ``control`` moves the plane beyond the boundary: a
    larger one needs fewer rounds and changes more. Quick on large images, as a round costs a few looks; SigmaZero finds
    smaller changes. It fails where gradients are masked.

    Args:
        steps: looks with a gradient, those of DeepFool and of the polish included.
        control: how far beyond the boundary the plane lies, over the distance of the boundary (the paper's lambda).
        overshoot: excess of a DeepFool step and of the change found, relative.
        polish: looks on fewer positions after the first success (see ``SigmaZero``); 0: the paper's algorithm.

    Cost: at most steps + 1 forwards and steps backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0]]))
    >>> out = mohs.attack(SparseFool(), net, torch.tensor([[0.9, 0.4, 0.5]]), torch.tensor([0]), "l0:inf")
    >>> bool(out.success), float(out.size)
    (True, 1.0)

    **Differs from the paper**: DeepFool follows the strongest rival alone, one backward per step, and leaves out coordinates
    that the box stops; the normal is taken at DeepFool's own point, for nothing, before the plane is moved; the polish;
    goals to reach a class.
    **Source**: A. Modas, S. Moosavi-Dezfooli, P. Frossard, "SparseFool: a few pixels make a big difference", CVPR 2019,
    algorithms 1 and 2, equations 5 to 8.
    """

    steps: int = 100
    control: float = 3.0
    overshoot: float = 0.02
    polish: int = 40
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l0",)

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_whole(self, "polish", least=0)
        check_least(self, 1, "control")
        check_least(self, 0, "overshoot")

    def init(self, problem: Problem) -> SparseFoolState:
        """At the clean input."""
        geometry(problem)
        x, label = problem.begin(), problem.goal.label
        polished = torch.full_like(label, -1)
        return SparseFoolState(x=x, sparse=polished < 0, mean=torch.zeros_like(x), polished=polished)

    def step(self, problem: Problem, state: SparseFoolState, k: int) -> SparseFoolState:
        """A step of DeepFool, or of the linear solver where DeepFool has crossed; after a success, the polish."""
        x, x0, box = state.x, problem.x0, problem.threat.box
        view = problem.linearize(x, margin)
        w = view.gradient()
        begun = (state.polished >= 0) | (view.met & state.sparse)
        polished = torch.where(begun, state.polished + 1, -1)

        crossed = view.met & ~state.sparse
        gap = (problem.goal.confidence - view.value).clamp_min_(0.0) + 2 * rounding(view.logits)
        along = free(w, x, box)  # the box would eat the share of the others
        dual = L2(math.inf).dual(along)
        lost = dual <= torch.finfo(w.dtype).tiny
        length = torch.where(lost, 0.0, gap / dual) * (1 + self.overshoot)
        moved = (x + per_row(length, x) * L2(math.inf).steepest(along)).clamp_(*box)
        if bool((crossed & ~begun).any()):
            gain = self.control * (w * (x - x0)).flatten(1).sum(1)
            r = L1(math.inf).shortest(w, gain, x0, box).mul_(1 + self.overshoot)
            moved = torch.where(per_row(crossed, x), (x0 + r).clamp_(*box), moved)
        mean = state.mean
        if bool(begun.any()):
            fewer, average = tighten(problem, w, mean)
            moved = torch.where(per_row(begun, x), fewer, moved)
            mean = torch.where(per_row(begun, x), average, mean)
        done = least(problem) | (polished >= self.polish) | (lost & ~begun)
        return replace(state, x=moved, done=done, sparse=crossed, mean=mean, polished=polished)
