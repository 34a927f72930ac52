"""DeepFool: binary, multi-class, any p-norm, with and without box."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._rivals import SPREAD, candidates, find_nearest, likely, pairs
from mohs.attacks._settings import check_least, check_whole
from mohs.attacks._smallest import free
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.target import rounding
from mohs.threat import Access

FINAL = 0.05
"""Below this share of the first gap the direction is found and only the boundary is left to reach."""


@dataclass
class DeepFoolState(State):
    """``classes`` [B, c]: the candidates; ``norm`` [B, c]: the dual gradient norm of each when last linearised;
    ``gap`` [B]: logits to the nearest boundary at the last step, ``first`` [B]: at the first one; ``push`` [B]: logits to
    go beyond it; ``eaten`` [B]: did the box take nearly all of the last step; ``polished`` [B]: projections since the boundary
    was crossed."""

    classes: Tensor | None = None
    norm: Tensor | None = None
    gap: Tensor | None = None
    first: Tensor | None = None
    push: Tensor | None = None
    eaten: Tensor | None = None
    polished: Tensor | None = None


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
        polish: once across, how often to project the clean input onto the boundary linearised at the point found; such a
            point counts where it is smaller. 0: not at all, as in the paper.

    Cost per step: 1 forward, and at most ``candidates`` backwards in the first step, ``revisit`` in later ones (a class that
    would be farther away even with a gradient four times as large as last seen is passed over); memory O(batch x inputs).
    With ``targets`` or aims: 1 backward.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(DeepFool(overshoot=1e-4), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 3)  # exactly 0.2 / sqrt(2)
    0.141

    **Differs from the paper**: steps are clipped to the box, and near the boundary, or where clipping has eaten a whole
    step, replaced by the exact smallest step inside the box; later steps linearise only the ``revisit`` nearest candidates;
    the point found is polished (``revisit=candidates, polish=0`` without a box is the paper's algorithm 2 to the letter);
    linearised at x0 + (1 + overshoot) r, where the stopping test looks, as the authors' code does; each step also covers
    the rounding of the logits; a targeted form (nearest boundary to one class).
    **Source**: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool: a simple and accurate method to fool deep neural
    networks", CVPR 2016, algorithms 1 and 2, section 3.3 (equations 10 to 13).
    """

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10
    revisit: int = 4
    polish: int = 1
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    uneven: ClassVar[bool] = True
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "candidates", "revisit")
        check_whole(self, "polish", least=0)
        check_least(self, 0, "overshoot")

    def init(self, problem: Problem) -> DeepFoolState:
        """At the clean input."""
        return DeepFoolState(problem.begin())

    def step(self, problem: Problem, state: DeepFoolState, k: int) -> DeepFoolState:
        """Linearise, find the nearest boundary, step just across it."""
        x, box, region = state.x, problem.threat.box, problem.threat.region
        view = problem.linearize(x)
        logits = view.logits
        classes, norm, last, first = state.classes, state.norm, state.gap, state.first
        push, eaten, polished = state.push, state.eaten, state.polished
        if (
            classes is None
            or norm is None
            or last is None
            or first is None
            or push is None
            or eaten is None
            or polished is None
        ):
            classes = candidates(problem, view, self.candidates)
            norm = torch.zeros_like(classes, dtype=x.dtype)
            last = first = torch.full_like(logits[:, 0], math.inf)
            push, polished = 2 * rounding(logits), torch.zeros_like(problem.goal.label)
            eaten = torch.zeros_like(problem.found.met)
        raised, lowered = pairs(problem, view, classes)
        lead = (logits.gather(1, lowered) - logits.gather(1, raised)).masked_fill_(raised == lowered, math.inf)
        gap = lead.clamp_min(0.0)
        # A step that gained nothing: the box has eaten it, or it was below the resolution of x, or the model is that curved
        stuck = gap.amin(1) >= last
        last = gap.amin(1)
        first = last if k == 0 else first
        # logits that cancel to nothing are still no more exact than the gap that was there
        least = 2 * torch.maximum(rounding(logits), torch.finfo(logits.dtype).eps * first)
        push = torch.where(stuck, 2 * push, least)
        final = last < FINAL * first
        exact = ((stuck & eaten) | final) & ~problem.found.settled
        narrow = _rows(exact)
        gap = gap + push.unsqueeze(1)
        estimate = torch.where(lead < 0, lead, gap / likely(norm))  # a class that has won comes first
        order = estimate.argsort(dim=1, stable=True)
        visits = classes.shape[1] if k == 0 else min(self.revisit, classes.shape[1])
        seeking = ~(problem.found.settled | view.met | (polished > 0) | final)
        # gradients change with the way that is still to go
        spread = 1 + (SPREAD - 1) * (4 * last / first).nan_to_num(1.0).clamp(0.0, 1.0)

        def measure(c: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if len(narrow):
                w = w.index_copy(0, narrow, free(w[narrow], x[narrow], box))
            dual = region.dual(w)
            return w, dual, gap.gather(1, c).squeeze(1) / dual

        across = view.met & (polished < (self.polish if k else 0))  # nothing to polish where the clean input is met
        seen = find_nearest(
            view,
            (raised, lowered),
            order,
            visits,
            gap,
            norm,
            spread,
            measure,
            first=(polished == 0) | across,
            further=seeking,
        )
        nearest, best, norm = seen.distance, seen.w, seen.norm
        lost = nearest.isinf() & ~across  # no candidate has a gradient: nowhere to go
        length = (1 + self.overshoot) * nearest.masked_fill(lost, 0.0)
        moved = x + per_row(length, x) * region.steepest(best)
        if len(rows := _rows(exact & ~lost)):
            gain = (nearest * region.dual(best))[rows] * (1 + self.overshoot)
            moved[rows] = x[rows] + region.shortest(best[rows], gain, x[rows], box)
        if len(rows := _rows(across)):
            x0, w = problem.x0[rows], seen.steep[rows]
            gain = (w * (x[rows] - x0)).flatten(1).sum(1) + lead.gather(1, order[:, :1]).squeeze(1)[rows]
            moved[rows] = x0 + (1 + self.overshoot) * region.shortest(w, gain, x0, box)
        moved.clamp_(*box)
        # the true gain is no longer known here, but how much of the step is left is
        wanted = (nearest * region.dual(best)).masked_fill(lost, 0.0)
        eaten = (best * (moved - x)).flatten(1).sum(1) < FINAL * wanted
        done = (view.met & ~across) | (~view.met & (polished > 0)) | lost
        # as many classes as this time; among equals, more the closer the runner-up
        rival = (gap / norm).topk(min(2, gap.shape[1]), largest=False).values[:, -1]
        demand = torch.where(view.met, 0.0, seen.visited + (nearest / rival).nan_to_num(0.0, posinf=0.0))
        return DeepFoolState(moved, done, classes, norm, last, first, push, eaten, polished + across, demand=demand)


def _rows(mask: Tensor) -> Tensor:
    """Indices of the wanted rows, never just one: torch sums a single long row in another order than one of several."""
    rows = mask.nonzero().squeeze(1)
    return rows.repeat(2) if len(rows) == 1 else rows
