"""What an attack climbs: each objective maps logits and goal to a value and its cotangent, per row.

``objective(logits [B, K], goal) -> (value [B], cotangent [B, K])``. Larger is closer to the attacker's goal; nothing is
averaged over rows. The cotangent is the derivative of the value with respect to the logits *up to a positive factor per
row*: every step rule here is invariant to that factor, and a float32 derivative underflows on confident models. Values are
shift invariant and finite for finite logits of any scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mohs.problem import Goal


class Objective:
    """A function ``(logits, goal) -> (value, cotangent)`` whose repr is its name, because an attack's repr is its record."""

    def __init__(self, function: Callable[[Tensor, Goal], tuple[Tensor, Tensor]]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        """(value [B], cotangent [B, K]) of logits [B, K]."""
        return self.function(logits, goal)

    def __repr__(self) -> str:
        return self.function.__name__


@Objective
def cross_entropy(logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """Cross-entropy: -log p of the class to leave, or log p of the class to reach (or to aim at).

    The cotangent is scaled by 1 / (1 - p): it is the softmax over the *other* classes minus the one-hot of the class,
    which keeps its direction when p rounds to 1 and the plain derivative is exactly zero (at margin 40 in float32 the
    component of the true class is). ``plain_cross_entropy`` is the unscaled one.

    >>> value, cotangent = cross_entropy(torch.tensor([[1000.0, 0.0, 0.0]]), Goal.leave(torch.tensor([0])))
    >>> value.tolist(), cotangent.tolist()
    ([-0.0], [[-1.0, 0.5, 0.5]])

    **Differs from the paper**: the positive factor per row; a sign or normalised step does not see it.
    **Source**: I. Goodfellow, J. Shlens, C. Szegedy, ICLR 2015, section 4; A. Madry et al., ICLR 2018, equation 2.1.
    """
    pivot = goal.pivot.unsqueeze(1)
    value = torch.log_softmax(logits, 1).gather(1, pivot).squeeze(1).neg_()
    others = torch.softmax(logits.scatter(1, pivot, -torch.inf), 1)
    direction = others.scatter_(1, pivot, -1.0)
    return value * goal.sign, direction * goal.sign.unsqueeze(1)


@Objective
def plain_cross_entropy(logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """Cross-entropy with its unscaled derivative, as other libraries compute it: vanishes on saturated logits.

    For comparisons and for demonstrations of gradient masking; prefer ``cross_entropy``.
    """
    pivot = goal.pivot.unsqueeze(1)
    log_p = torch.log_softmax(logits, 1)
    cotangent = log_p.exp()
    cotangent.scatter_add_(1, pivot, torch.full_like(cotangent[:, :1], -1.0))
    return -log_p.gather(1, pivot).squeeze(1) * goal.sign, cotangent * goal.sign.unsqueeze(1)


@Objective
def margin(logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """The logit margin of the goal: best other class minus the class to leave, or the class to reach minus its best rival.

    With an aim it is the aimed class minus the class to leave. Piecewise linear, never saturates; positive means met
    (without an aim).

    **Source**: N. Carlini, D. Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, objective f6.
    """
    up, down = goal.contest(logits)
    up, down = up.unsqueeze(1), down.unsqueeze(1)
    value = (logits.gather(1, up) - logits.gather(1, down)).squeeze(1)
    cotangent = torch.zeros_like(logits)
    cotangent.scatter_(1, up, 1.0)
    cotangent.scatter_(1, down, -1.0)
    return value, cotangent


def from_loss(loss: Callable[[Tensor, Goal], Tensor]) -> Objective:
    """An objective from any differentiable ``loss(logits, goal) -> [B]`` (larger is better for the attacker), by autograd."""

    @functools.wraps(loss)
    def objective(logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = logits.detach().requires_grad_(True)
            value = loss(z, goal)
            (cotangent,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), cotangent

    return Objective(objective)
