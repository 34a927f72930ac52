"""FAB: the fast adaptive boundary attack, untargeted and targeted, in any p-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks._base import State
from mohs.attacks._rivals import Rivals
from mohs.attacks._settings import check_least, check_share, check_whole
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access


@dataclass
class FABState(State):
    """``rivals``: the classes that may be the nearest, and what is known of their boundaries; ``over`` [B]: how far beyond
    the boundary, relative to the step."""

    rivals: Rivals | None = None
    over: Tensor | None = None


@dataclass(frozen=True)
class FAB:
    """The smallest change by walking along the decision boundary, always drawn towards the clean input.

    With pi the nearest boundary linearised at x_k, and project(x, pi) the nearest point of pi inside the box:

        base = x0 + beta * (x_k - x0) if x_k is adversarial, else x_k
        d = project(base, pi) - base,     d0 = project(x0, pi) - x0
        a = min(|d| / (|d| + |d0|), alpha_max)
        x_(k+1) = (1 - a) * (base + eta * d) + a * (x0 + eta * d0)

    Finds small changes in few steps, without a step size and at any scale of inputs or logits. Use it where no radius is
    given, with ``aims`` for the targeted form (FAB-T) and with a finite radius as a complement to APGD. It follows
    linearised boundaries, so it fails where gradients are masked. Restarts begin at random points.

    Args:
        steps: points that are linearised.
        alpha_max: the largest weight of the step from the clean input.
        eta: how far beyond the linearised boundary, relative to the step.
        beta: how much of its change an adversarial point keeps.
        candidates: classes of highest logit that are linearised at first.
        revisit: how many of them are linearised again in later steps, those with the smallest gap relative to their gradient.

    Cost per step: 1 forward, and at most ``candidates`` backwards in the first step, ``revisit`` in later ones (a class that
    would be farther away even with a gradient four times as large as last seen is passed over); memory O(batch x inputs).
    With ``targets`` or aims: 1 backward.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(FAB(steps=20), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf")
    >>> round(float(out.size), 3)  # exactly 0.2 / sqrt(2)
    0.141

    **Differs from the paper**: one forward per step instead of two: an adversarial point is linearised where it was found,
    and the boundary is then seen from ``base``; later steps linearise the ``revisit`` most promising classes; the
    nearest boundary is the one nearest to the clean input, whose distance counts, not to x_k; each step also covers the
    rounding of the logits; a restart takes its radius, at most half of the first linearised distance and of eps, from a look
    at the clean input instead of from earlier restarts; ``eta`` shrinks once it is all that separates a point from the
    linearised optimum; any p-norm; no final search on the segment to the clean input, which gained nothing after these steps.
    **Source**: F. Croce, M. Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
    ICML 2020, algorithm 1, equations 7 to 10; targeted form: F. Croce, M. Hein, "Reliable evaluation of adversarial
    robustness with an ensemble of diverse parameter-free attacks", ICML 2020, section 5.
    """

    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    candidates: int = 10
    revisit: int = 3
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    uneven: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "candidates", "revisit")
        check_share(self, "alpha_max", "beta", zero=True)
        check_least(self, 1, "eta")

    def init(self, problem: Problem) -> FABState:
        """At the clean input, or where the caller says."""
        return FABState(problem.begin(), over=torch.full_like(problem.eps, self.eta - 1))

    def step(self, problem: Problem, state: FABState, k: int) -> FABState:
        """Linearise, project both the point and the clean input, mix, extrapolate."""
        assert state.over is not None
        x, x0, region, box = state.x, problem.x0, problem.threat.region, problem.threat.box
        view = problem.linearize(x)
        rivals = state.rivals or Rivals.at(problem, view, self.candidates)
        boundary, rivals = rivals.nearest(problem, view, x, self.revisit if k else self.candidates)
        base = torch.where(per_row(view.met, x), torch.lerp(x0, x, self.beta), x)
        step, jump = boundary.shortest(base, region, box), boundary.shortest(x0, region, box)
        near, far, size = (_size(problem, change) for change in (step, jump, x - x0))
        share = (near / (near + far)).clamp_(max=self.alpha_max).nan_to_num_(nan=self.alpha_max)
        settled = view.met & (size < (1 + state.over) * far)  # as close as this overshoot gets
        over = torch.where(settled, state.over / 2, state.over)
        over = torch.where(view.met, over, (2 * over).clamp_max(self.eta - 1))
        x = torch.lerp(base + step, x0 + jump, per_row(share, x))
        x = (x + per_row(over, x) * torch.lerp(step, jump, per_row(share, x))).clamp_(*box)
        # met at the clean input: nothing is smaller; no gradient where it begins: nowhere to go
        done = (view.met & (size == 0)) | ((near == 0) & (far == 0) & (k == 0) & ~view.met)
        if k == 0 and problem.warm is None and bool((problem.restart > 0).any()):
            start = region.start(x0, torch.minimum(far, problem.eps) / 2, box, problem.key)
            x = torch.where(per_row(problem.restart > 0, x), start, x)
        return FABState(x, done, rivals=rivals, over=over, demand=rivals.visited)


def _size(problem: Problem, change: Tensor) -> Tensor:
    return problem.threat.region.measure(change, torch.zeros_like(change))
