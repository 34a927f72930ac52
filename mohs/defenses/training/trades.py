"""TRADES: the clean loss, and how far the answer moves in the region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._settings import number
from mohs.defenses.training._quiet import evaluating
from mohs.defenses.training.objective import Context
from mohs.defenses.training.room import Room, slope
from mohs.target import classify


@dataclass(frozen=True)
class TRADES:
    """Cross-entropy on the inputs as they are, plus the divergence between the answers there and at the worst point near.

        loss = J(x, y) + beta * KL(p(x) || p(x'))
        x' = argmax of KL(p(x) || p(x')) over the region        (steps of ascent from x + noise * N(0, 1))

    It trades accuracy for robustness openly, by ``beta``, and usually ends more robust than the saddle point. The labels
    play no part in the second term: a net is asked to be constant, not to be right. Both answers are differentiated. As
    with any training against a few steps, judge the result by stronger attacks than its own.

    Args:
        steps: of the ascent.
        step_size: length of a step in the region's norm, input units; None: 2.5 * eps / steps.
        beta: weight of the divergence, >= 0; 0 is natural training, and then no ascent is made. The paper's is 6 (CIFAR-10)
            and 1 (MNIST).
        noise: standard deviation of the start, input units; at x itself the divergence has no slope.

    Cost: 2 forwards and 2 backwards, and steps + 1 forwards and steps backwards of the ascent, per example and epoch.

    >>> import torch
    >>> from mohs.threat import Threat
    >>> room = Room(Threat.parse("linf:0.1"), eps=0.1, seed=0)
    >>> context = Context(perturb=lambda *_: None, eps=0.1, done=0.0, room=room)
    >>> net = nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    >>> losses = [TRADES(beta=beta).loss(net, x, y, context) for beta in (0.0, 1.0)]
    >>> [round(loss.item(), 4) for loss in losses]  # log 2; and -log(4 p q) / 2 more at a corner of the region
    [0.6931, 0.6981]

    **Differs from the paper**: any region; the start is brought into region and box. p(x) is looked at once for the loss,
    where the published code looks twice and counts its batch statistics twice.
    **Source**: H. Zhang, Y. Yu, J. Jiao, E. Xing, L. El Ghaoui, M. Jordan, "Theoretically principled trade-off between
    robustness and accuracy", ICML 2019, equation 5 and algorithm 1.
    """

    steps: int = 10
    step_size: float | None = None
    beta: float = 6.0
    noise: float = 1e-3
    attack: ClassVar[None] = None
    own_points: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.steps, "steps of TRADES", 1, whole=True)
        number(self.beta, "beta of TRADES, the weight of the divergence,", 0)
        number(self.noise, "noise of TRADES, the standard deviation of its start,", 0, above=True)
        if self.step_size is not None:
            number(self.step_size, "step_size of TRADES", 0, above=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x, y) + beta * KL(p(x) || p(x')), means over the batch; a term of weight zero is not computed."""
        if self.beta == 0:
            return F.cross_entropy(classify(model, x), y)
        room = context.around(self)
        points = context.once(lambda: self.points(model, x, room))
        logits = classify(model, x)
        apart = divergence(logits.log_softmax(1), classify(model, points).log_softmax(1)).mean()
        return F.cross_entropy(logits, y) + self.beta * apart

    def points(self, model: nn.Module, x: Tensor, room: Room) -> Tensor:
        """Where in the region the answer differs most from that at ``x``; the model is in eval mode meanwhile."""
        with evaluating(model):
            with torch.no_grad():
                here = classify(model, x).log_softmax(1)
            radii = room.radii(x)
            sizes = room.threat.region.default_step(radii, self.steps, room.threat.box)
            size = float(sizes[0]) if self.step_size is None else self.step_size
            found = room.project(x + self.noise * room.normal(x), x)
            for _ in range(self.steps):
                g = slope(lambda point: divergence(here, classify(model, point).log_softmax(1)), found)
                found = room.advance(found, g, size, x)
        return found


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [B, K], per row [B].

    >>> p = torch.tensor([[0.5, 0.5]]).log()
    >>> q = torch.tensor([[0.25, 0.75]]).log()
    >>> round(float(divergence(p, q)), 4), round(float(divergence(q, p)), 4)
    (0.1438, 0.1308)
    """
    return (p.exp() * (p - q)).sum(1)
