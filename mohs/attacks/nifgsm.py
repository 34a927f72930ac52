"""The Nesterov iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.attacks.mifgsm import MIFGSM, MomentumState, accumulate, edge_step
from mohs.problem import Problem
from mohs.regions import per_row


@dataclass(kw_only=True)
class NesterovState(MomentumState):
    """``x`` is where the gradient is taken, ahead of ``base`` [B, ...], the iterate."""

    base: Tensor


@dataclass(frozen=True)
class NIFGSM(MIFGSM):
    """MI-FGSM that takes its gradient where the momentum is about to lead.

        ahead = x_k + step_size * decay * m_k
        m_(k+1) = decay * m_k + grad J(ahead, y) / ||grad J(ahead, y)||_1
        x_(k+1) = project(x_k + step_size * steepest(m_(k+1)))

    Looking ahead corrects the momentum before it is followed. Meant for transfer, as MI-FGSM is. Deterministic. As m has a
    1-norm of order one, it leads ahead by a fraction of a step per coordinate, and on large inputs the two hardly differ.

    Args:
        steps: gradient steps.
        step_size: length of a step in the region's norm, input units; None: eps / steps (L0, patches: see the region).
        decay: how much of the accumulated direction is kept; 0 is BIM.
        objective: what to climb.

    Cost: at most steps + 1 forwards and steps backwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> out = mohs.attack(NIFGSM(), net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "linf:0.15")
    >>> bool(out.success)
    True

    **Differs from the paper**: any region; the point ahead is brought back into it, so that it may succeed too; of the
    iterates only the last is looked at; no scaled copies (SI).
    **Source**: J. Lin, C. Song, K. He, L. Wang, J. Hopcroft, "Nesterov accelerated gradient and scale invariance for
    adversarial attacks", ICLR 2020, section 3.2 (equations 6 to 8).
    """

    random: ClassVar[bool] = False

    def init(self, problem: Problem) -> NesterovState:
        """At the clean input, without momentum."""
        x = problem.begin()
        return NesterovState(x=x, base=x, momentum=torch.zeros_like(x))

    def step(self, problem: Problem, state: MomentumState, k: int) -> NesterovState:
        """Add the gradient ahead to the momentum, and step from the iterate along it."""
        assert isinstance(state, NesterovState)
        g = problem.gradient(state.x, self.objective)
        momentum = accumulate(state.momentum, g, self.decay)
        size = edge_step(problem, self.step_size, self.steps)
        base = problem.advance(state.base, momentum, size)
        ahead = base
        if k < self.steps - 1:
            ahead = problem.project(base + per_row(self.decay * size, base) * momentum)
        return NesterovState(x=ahead, base=base, momentum=momentum)
