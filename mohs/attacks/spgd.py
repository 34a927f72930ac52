"""Sparse-PGD: a dense change and a mask of positions, climbed together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent, check_positive, check_whole
from mohs.attacks._sparse import geometry, unit
from mohs.objectives import Objective, cross_entropy
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access, Threat


@dataclass(kw_only=True)
class SPGDState(State):
    """``change`` [B, ...]: the dense change; ``mask`` [B, positions]: how much each position is wanted, before the sigmoid;
    ``chosen`` [B, positions]: the positions of the last point; ``stale`` [B]: steps in which they stood still."""

    change: Tensor
    mask: Tensor
    chosen: Tensor
    stale: Tensor


@dataclass(frozen=True)
class SPGD:
    """Gradient ascent within an L0 radius: a dense change says where each position would go, a mask which of them may.

    With p the change, m the mask, and top(m) the eps positions of largest m:

        x = x0 + p * top(m),    g = grad J(x)
        m = m + mask_step * sqrt(inputs) * d / ||d||,    d = <g, p> * sigmoid'(m)   (summed over channels)
        p = clip(p + step_size * sign(g))                     [unprojected]
        p = clip(p + step_size * sign(g) * top(m))            [projected]
        draw m again where top(m) has stood still in ``patience`` steps

    The mask remembers what PGD on L0 forgets whenever it projects. The two gradients fail on different inputs: the
    unprojected one is the stronger, run both. Give it restarts and steps; it fails where gradients are masked.

    Args:
        steps: gradient steps.
        step_size: step of the change, in box widths.
        mask_step: step of the mask over the root of the number of inputs.
        projected: move only the positions chosen.
        patience: steps in which the positions stood still, counted since the last draw, before the mask is drawn again.
        random_start: draw change and mask at first, else begin at zero.
        objective: what to climb.

    Cost: at most steps + 1 forwards and steps backwards per restart; rows stop at their first success.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0]]))
    >>> out = mohs.attack(SPGD(), net, torch.tensor([[0.9, 0.4, 0.5]]), torch.tensor([0]), "l0:1")
    >>> bool(out.success), float(out.size)
    (True, 1.0)

    **Differs from the paper**: lengths in box widths; the sign of the unprojected gradient is that of g, as the sigmoid is
    positive; a mask drawn again belongs to the row whose positions
    stood still, and the steps need not be consecutive (as the authors' code counts).
    **Source**: X. Zhong, Y. Huang, C. Liu, "Towards efficient training and evaluation of robust models against l0 bounded
    adversarial perturbations", ICML 2024 (arXiv 2405.05075), algorithm 1, equations 4 to 8.
    """

    steps: int = 100
    step_size: float = 0.25
    mask_step: float = 0.25
    projected: bool = False
    patience: int = 3
    random_start: bool = True
    objective: Objective = cross_entropy
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("l0",)

    def __post_init__(self) -> None:
        check_ascent(self)
        check_whole(self, "patience")
        check_positive(self, "mask_step")

    def own_step(self, threat: Threat) -> float:
        """Length of a step, in units of ``step_size``."""
        return self.step_size

    @property
    def random(self) -> bool:
        """Do restarts differ?"""
        return True

    def init(self, problem: Problem) -> SPGDState:
        """A random change at random positions, or the caller's points."""
        region, width = geometry(problem)
        x0, (low, high) = problem.x0, problem.threat.box
        places = (region.positions(x0).shape[2],)
        if problem.warm is not None:
            change = problem.begin() - x0
            mask = region.positions(change != 0).any(1).to(x0.dtype)
        elif self.random_start:
            change = streams.uniform(problem.key, tuple(x0.shape[1:]), dtype=x0.dtype).mul_(2).sub_(1).mul_(width)
            change = (change + x0).clamp_(low, high).sub_(x0)
            mask = streams.normal(problem.key, places, draw=1, dtype=x0.dtype)
        else:
            change, mask = torch.zeros_like(x0), x0.new_zeros(len(x0), *places)
        x, chosen = self._point(problem, change, mask)
        return SPGDState(x=x, change=change, mask=mask, chosen=chosen, stale=torch.zeros_like(problem.goal.label))

    def step(self, problem: Problem, state: SPGDState, k: int) -> SPGDState:
        """One step of the mask and one of the change."""
        region, width = geometry(problem)
        x0, (low, high) = problem.x0, problem.threat.box
        g = unit(problem.gradient(state.x, self.objective))
        chance = state.mask.sigmoid()
        d = unit(region.positions(g * state.change).sum(1) * (chance * (1 - chance)))
        norm = torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min_(torch.finfo(d.dtype).tiny)
        mask = state.mask + d / norm * (self.mask_step * math.sqrt(x0[0].numel()))

        step = g.sign().mul_(self.step_size * width)
        if self.projected:
            step = region.positions(step).mul(state.chosen.unsqueeze(1)).view_as(step)
        change = step.add_(state.change).add_(x0).clamp_(low, high).sub_(x0)

        x, chosen = self._point(problem, change, mask)
        stale = state.stale + (chosen == state.chosen).all(1)
        stuck = stale >= self.patience
        if bool((stuck & ~problem.found.settled).any()):
            fresh = streams.normal(problem.key, tuple(mask.shape[1:]), draw=k + 2, dtype=mask.dtype)
            mask = torch.where(stuck.unsqueeze(1), fresh, mask)
            new_x, new_chosen = self._point(problem, change, mask)
            x = torch.where(per_row(stuck, x), new_x, x)
            chosen = torch.where(stuck.unsqueeze(1), new_chosen, chosen)
            stale = stale.masked_fill(stuck, 0)
        return SPGDState(x=x, change=change, mask=mask, chosen=chosen, stale=stale)

    def _point(self, problem: Problem, change: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(the change at the eps positions of largest mask, these positions)."""
        region, _ = geometry(problem)
        chosen = region.top(mask, problem.eps)
        full = (problem.x0 + change).clamp_(*problem.threat.box)
        x = torch.where(chosen.unsqueeze(1), region.positions(full), region.positions(problem.x0))
        return x.view_as(full), chosen
