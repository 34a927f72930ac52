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
from torch.nn.functional import softplus

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
    component of the true class is). ``plain_cross_entropy`` is the unscaled one. Of a model that rejects, the class to leave
    is the label or the rejection, whichever is likelier, and the other has no part in it (``Goal.contending``).

    >>> value, cotangent = cross_entropy(torch.tensor([[1000.0, 0.0, 0.0]]), Goal.leave(torch.tensor([0])))
    >>> value.tolist(), cotangent.tolist()
    ([-0.0], [[-1.0, 0.5, 0.5]])

    **Differs from the paper**: the positive factor per row; a sign or normalised step does not see it.
    **Source**: I. Goodfellow, J. Shlens, C. Szegedy, ICLR 2015, section 4; A. Madry et al., ICLR 2018, equation 2.1.
    """
    logits = goal.contending(logits)
    pivot = (
        goal.pivot if goal.reject is None else torch.where(goal.reach | (goal.aim >= 0), goal.pivot, goal.guard(logits))
    )
    pivot = pivot.unsqueeze(1)
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


@Objective
def dlr(logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """The difference of logits ratio: the margin over the distance from the first to the third logit (of this row).

        leaving:          (max_(i != y) z_i - z_y) / (z_(1) - z_(3))
        aimed, reaching:  (z_up - z_down) / (z_(1) - (z_(3) + z_(4)) / 2)

    Invariant to shift and scale of the logits, so that neither temperature nor saturation hides it. It is flat along the way
    to a runner-up that drags the third logit with it, so it complements other objectives and replaces none. The cotangent
    is the derivative times the denominator.

    Where there are fewer logits (or finite ones) than the formula names, the objective is the margin: of two logits any function
    that ignores shift and scale is a constant, and so is the aimed ratio of three, seen from the highest to the lowest.

    >>> value, cotangent = dlr(torch.tensor([[6.0, 4.0, 2.0, 0.0]]), Goal.leave(torch.tensor([0])))
    >>> value.tolist(), cotangent.tolist()
    ([-0.5], [[-0.5, 1.0, -0.5, 0.0]])

    **Differs from the paper**: the positive factor per row; what happens below four classes; reaching a class, where the
    paper knows the true class, the strongest rival stands for it.
    **Source**: F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020, equations 6 and 7.
    """
    gap, cotangent = margin(logits, goal)
    if logits.shape[1] == 2:
        return gap, cotangent
    aimed = goal.reach | (goal.aim >= 0)
    top, order = logits.sort(dim=1, descending=True, stable=True)  # among equals the first, as the rival is the first
    third, fourth = order[:, 2:3], order[:, min(3, logits.shape[1] - 1)].unsqueeze(1)
    fourth = torch.where(aimed.unsqueeze(1), fourth, third)
    spread = top[:, 0] - (logits.gather(1, third) + logits.gather(1, fourth)).squeeze(1) / 2
    whole = spread.isfinite() & (~aimed | (logits.shape[1] > 3))
    # where three logits are equal, the margin is zero with them or infinitely many times as large
    least = (gap.abs() * torch.finfo(logits.dtype).eps).clamp_min(torch.finfo(logits.dtype).tiny)
    value = gap / torch.maximum(spread, least)
    weight = torch.where(whole & (spread > least), value, 0.0).unsqueeze(1)
    cotangent.scatter_add_(1, order[:, :1], -weight)
    cotangent.scatter_add_(1, third, weight / 2).scatter_add_(1, fourth, weight / 2)
    return torch.where(whole, value, gap), cotangent


@Objective
def probability_margin(logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """The margin of probabilities v = p_up - p_down, on a scale that never saturates: log((1 + v) / (1 - v)).

    Up and down are the classes of the logit margin. The order of any two points, the sign and the direction of the gradient
    are those of v; but v is exactly -1 in float32 on a confident model, and then neither tells points apart nor has a
    derivative. As 1 + v sums the probabilities but p_down, with p_up twice, the value is the difference of two
    logsumexps, and its derivative that of two softmaxes. For two classes it is the logit margin.

    Of the label and the rejection of a model that rejects, only the likelier has a part in it (``Goal.contending``).

    A class to reach that has no probability yet has no part in the derivative of v; so there the value is its
    log-odds, log(p / (1 - p)): its logit against the logsumexp of all others.

    >>> value, cotangent = probability_margin(torch.tensor([[1000.0, 0.0, 0.0]]), Goal.leave(torch.tensor([0])))
    >>> round(float(value), 3), [round(c, 3) for c in cotangent[0].tolist()]
    (-999.595, [-1.0, 0.667, 0.333])

    **Differs from the paper**: the increasing map applied to v; the class to reach, which the paper does not treat.
    **Source**: Y. Xie et al., "Towards million-scale adversarial robustness evaluation with stronger individual attacks",
    CVPR 2025 (arXiv 2411.15210), the probability margin loss.
    """
    logits = goal.contending(logits)
    up, down = goal.contest(logits)
    up, down, reach = up.unsqueeze(1), down.unsqueeze(1), goal.reach.unsqueeze(1)
    high, low = logits.gather(1, up), logits.gather(1, down)
    gain = logits.scatter(1, down, high)  # the winner's logit twice, the loser's not at all
    loss = logits.scatter(1, up, low)
    gain = torch.where(reach, torch.full_like(gain, -torch.inf).scatter_(1, up, high), gain)
    loss = torch.where(reach, logits.scatter(1, up, -torch.inf), loss)
    value = gain.logsumexp(1) - loss.logsumexp(1)
    gain, loss = gain.softmax(1), loss.softmax(1)
    cotangent = gain - loss
    won, lost = 2 * gain.gather(1, up), -2 * loss.gather(1, down)
    pair = cotangent.scatter(1, up, won).scatter_(1, down, lost)
    return value, torch.where(reach, cotangent, pair)


def likelihood(logits: Tensor, goal: Goal, unit: Tensor) -> tuple[Tensor, Tensor]:
    """log p(goal) of logits / ``unit`` [B], times unit, and its derivative by the logits: what L-BFGS climbs.

    Reaching a class it is the log-probability of the class, leaving one that of 'any other', log(1 - p). With the goal's odds
    o against all else it is -softplus(-o): a hinge with a round corner, ``unit`` logits wide.

    >>> value, cotangent = likelihood(torch.tensor([[9.0, 0.0]]), Goal.leave(torch.tensor([0])), torch.ones(1))
    >>> round(float(value), 3), [round(c, 3) for c in cotangent[0].tolist()]
    (-9.0, [-1.0, 1.0])
    """
    pivot, sign = goal.pivot.unsqueeze(1), goal.sign.to(logits)
    own = logits.gather(1, pivot)
    rest = logits.scatter(1, pivot, -torch.inf) / unit.unsqueeze(1)
    odds = sign * (rest.logsumexp(1) - own.squeeze(1) / unit) - goal.confidence / unit
    cotangent = rest.softmax(1).scatter_(1, pivot, -1.0) * (sign * torch.sigmoid(-odds)).unsqueeze(1)
    return -torch.nan_to_num(unit * softplus(-odds), nan=torch.finfo(logits.dtype).max), cotangent


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
