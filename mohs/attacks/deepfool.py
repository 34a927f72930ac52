"""DeepFool: binary, multi-class, any p-norm, with and without box."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.errors import UsageError
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.target import View, rounding
from mohs.threat import Access


@dataclass
class DeepFoolState(State):
    """``classes`` [B, c]: the candidates; ``norm`` [B, c]: the dual gradient norm of each when last linearised;
    ``gap`` [B]: logits to the nearest boundary at the last step; ``push`` [B]: logits to go beyond it."""

    classes: Tensor | None = None
    norm: Tensor | None = None
    gap: Tensor | None = None
    push: Tensor | None = None


@dataclass(frozen=True)
class DeepFool:
    """The smallest change by walking to the nearest linearised decision boundary, again and again until it is crossed.

    With f'_k = z_k - z_label and w'_k its input gradient, for every candidate class k:

        nearest = argmin_k |f'_k| / ||w'_k||_q,     q = p / (p - 1)
        r += |f'| / ||w'||_q^q * |w'|^(q-1) * sign(w')
        stop when the answer at x0 + (1 + overshoot) r differs

    For p = inf the step is the sign vector, for p = 1 all of it falls on the coordinate of largest |w'|. A one-logit
    classifier is the pair (0, z), for which this is the paper's binary algorithm. Fast and exact on linear models; on
    curved ones it overestimates the distance, and it stalls where gradients vanish. Use it for a quick estimate of
    robustness (``mohs.evaluation.rho_adv``).

    Args:
        steps: linearisations at most.
        overshoot: how far beyond the boundary, relative to the change.
        candidates: classes of highest logit that are linearised at first.
        revisit: how many of them are linearised again in later steps, nearest first by the norms last seen.

    Cost per step: 1 forward, and ``candidates`` backwards in the first step, ``revisit`` in later ones; memory
    O(batch x inputs). With ``targets`` or aims: 1 backward.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(DeepFool(overshoot=1e-4), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 3)  # exactly 0.2 / sqrt(2)
    0.141

    **Differs from the paper**: steps are clipped to the box, and a row whose last step gained less than half of what it
    promised takes the exact smallest step inside the box instead (doing so always is faster but overshoots: 5% larger
    changes on a small convolutional net); later steps linearise only the ``revisit`` nearest candidates (set it to
    ``candidates`` for the paper's algorithm 2 to the letter); linearised at x0 + (1 + overshoot) r, where the stopping
    test looks, as the authors' code does; each step also covers the rounding of the logits; a targeted form (nearest
    boundary to one class).
    **Source**: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool: a simple and accurate method to fool deep neural
    networks", CVPR 2016, algorithms 1 and 2, section 3.3 (equations 10 to 13).
    """

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10
    revisit: int = 3
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("steps", "candidates", "revisit"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"DeepFool's {name} must be a whole number >= 1; got {getattr(self, name)!r}.")
        if not self.overshoot >= 0:
            raise UsageError(f"DeepFool's overshoot must be >= 0; got {self.overshoot!r}.")

    def init(self, problem: Problem) -> DeepFoolState:
        """At the clean input."""
        return DeepFoolState(problem.x0.clone())

    def step(self, problem: Problem, state: DeepFoolState, k: int) -> DeepFoolState:
        """Linearise, find the nearest boundary, step just across it."""
        x, box, region = state.x, problem.threat.box, problem.threat.region
        view = problem.linearize(x)
        logits = view.logits
        classes, norm, last, push = state.classes, state.norm, state.gap, state.push
        if classes is None or norm is None or last is None or push is None:
            classes = self._candidates(problem, view)
            norm = torch.ones_like(classes, dtype=x.dtype)
            last = torch.full_like(logits[:, 0], math.inf)
            push = 2 * rounding(logits)
        raised, lowered = _pairs(problem, view, classes)
        gap = (logits.gather(1, lowered) - logits.gather(1, raised)).clamp_min_(0.0)
        gap.masked_fill_(
            raised == lowered, math.inf
        )  # where other logits are -inf, the label may be among its own rivals
        # a step that gained less than half of what it promised: the box has eaten it, or it was below the resolution of x.
        # Now only coordinates that can move count, the step is exact inside the box, and it goes twice as far beyond
        stuck = gap.amin(1) > 0.5 * last
        last = gap.amin(1)
        push = torch.where(stuck, 2 * push, 2 * rounding(logits))
        gap = gap + push.unsqueeze(1)
        order = (gap / norm).argsort(dim=1, stable=True)
        visits = classes.shape[1] if k == 0 else min(self.revisit, classes.shape[1])

        nearest = torch.full_like(push, math.inf)
        best = torch.zeros_like(x)
        norm = norm.clone()
        for j in range(visits):
            c = order[:, j : j + 1]
            cotangent = torch.zeros_like(logits)
            cotangent.scatter_(1, raised.gather(1, c), 1.0).scatter_(1, lowered.gather(1, c), -1.0)
            w = view.pull(cotangent, keep=j < visits - 1)
            if bool(stuck.any()):
                w = torch.where(per_row(stuck, x), _free(w, x, box), w)
            dual = region.dual(w)
            norm.scatter_(1, c, dual.unsqueeze(1))
            distance = gap.gather(1, c).squeeze(1) / dual
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            best = torch.where(per_row(closer, x), w, best)
        lost = nearest.isinf()  # no candidate has a gradient: nowhere to go
        length = (1 + self.overshoot) * nearest.masked_fill(lost, 0.0)
        change = per_row(length, x) * region.steepest(best)
        if bool(stuck.any()):
            exact = region.shortest(best, (nearest * region.dual(best)).masked_fill(lost, 0.0), x, box)
            change = torch.where(per_row(stuck, x), exact * (1 + self.overshoot), change)
        x = (x + change).clamp_(*box)
        return DeepFoolState(x, view.met | lost, classes, norm, last, push)

    def _candidates(self, problem: Problem, view: View) -> Tensor:
        """Rivals of highest logit, [B, c]; one of them where the row has a class to reach or to aim at."""
        goal, logits = problem.goal, view.logits
        if bool(goal.reach.any() | (goal.aim >= 0).any()):
            raised, lowered = goal.contest(logits)
            return torch.where(goal.reach, lowered, raised).unsqueeze(1)
        count = min(self.candidates, logits.shape[1] - 1)
        return logits.scatter(1, goal.label.unsqueeze(1), -math.inf).topk(count, dim=1).indices


def _pairs(problem: Problem, view: View, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(class to raise, class to lower) for each candidate, [B, c] each."""
    goal = problem.goal
    if bool(goal.reach.any()):
        raised, lowered = goal.contest(view.logits)  # the strongest rival changes from step to step
        return raised.unsqueeze(1), lowered.unsqueeze(1)
    return classes, goal.label.unsqueeze(1).expand_as(classes)


def _free(w: Tensor, x: Tensor, box: tuple[float, float]) -> Tensor:
    """The gradient without the coordinates that the box does not let follow it."""
    if math.isinf(box[0]) and math.isinf(box[1]):
        return w
    return w.masked_fill(((x >= box[1]) & (w > 0)) | ((x <= box[0]) & (w < 0)), 0.0)
