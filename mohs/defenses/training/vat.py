"""VAT: the clean loss, and how far the answer moves in the direction in which it moves most."""

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
from mohs.defenses.training.trades import divergence
from mohs.target import classify


@dataclass(frozen=True)
class VAT:
    """Cross-entropy on the inputs as they are, plus the divergence of the answer at the virtually adversarial point from that here.

        loss = J(x, y) + alpha * KL(p(x) || p(x + r))            p(x) taken as given
        d = N(0, 1) of unit length;   iterations times:  d = steepest(grad_r KL(p(x) || p(x + r)) at r = xi * d)
        r = eps * d

    Near x the divergence is half the quadratic form of a matrix H. Its slope at a short xi * d is nearly xi * H d, so each iteration
    is one of the power method: d turns towards the eigenvector of H of the largest eigenvalue, the direction in which the answer
    moves most. In other norms the steepest step takes the place of H d / ||H d||; it never makes the quadratic form of a unit change
    smaller either.

    The labels play no part in the second term. It makes the answer smooth around the data, which is a regulariser: it helps where
    labels are few, and against small radii. The point is the best one of a quadratic form, a single step long; expect less from it than
    from ``TRADES`` at radii where the net is not quadratic, and judge the result by attacks of many steps.

    Args:
        alpha: weight of the divergence, >= 0; 0 is natural training, and then no point is made. The paper's is 1.
        iterations: of the power method. The paper's is 1.
        xi: Euclidean length of the difference that stands for a derivative, input units. The published code's is 1e-6, at which the
            slope in single precision is mostly rounding; the default is right in single and in double precision.
        unlabelled: the label of rows that have none, such as the number of classes: they count in the divergence alone, and the
            cross-entropy is the mean over the others; None: every row has a label.

    Cost: 2 forwards and 2 backwards, and 1 + iterations forwards and iterations backwards for the point, per example and epoch.

    >>> from mohs.threat import Threat
    >>> room = Room(Threat.parse("l2:0.1"), eps=0.1, seed=0)
    >>> context = Context(perturb=lambda *_: None, eps=0.1, done=0.0, room=room)
    >>> net = nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> x, y = torch.tensor([[0.25, 0.75]]), torch.tensor([0])
    >>> change = VAT().points(net, x, room) - x  # along the difference of the two rows of weights, either way
    >>> round(float(change.norm()), 4), round(float(change[0, 1] / change[0, 0]), 2)
    (0.1, -0.33)
    >>> losses = [VAT(alpha=alpha).loss(net, x, y, context) for alpha in (0.0, 1.0)]
    >>> [round(loss.item(), 4) for loss in losses]  # log 2; and -log(4 p q) / 2 more
    [0.6931, 0.7056]

    **Differs from the paper**: rows with and without a label come in one batch; other norms; x + r is brought into the box; the
    default xi. The net is in eval mode while r is found; both answers of the loss are those of training mode and both count in
    batch statistics, where the published code leaves the second out.
    **Source**: T. Miyato, S. Maeda, M. Koyama, S. Ishii, "Virtual adversarial training: a regularization method for supervised and
    semi-supervised learning", TPAMI 2018, the section on the fast approximation of the perturbation and the algorithm in it; xi and
    which of the two answers is differentiated, also from the authors' code.
    """

    alpha: float = 1.0
    iterations: int = 1
    xi: float = 1e-2
    unlabelled: int | None = None
    attack: ClassVar[None] = None
    own_points: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        number(self.alpha, "alpha of VAT, the weight of the divergence,", 0)
        number(self.iterations, "iterations of VAT, those of the power method,", 1, whole=True)
        number(self.xi, "xi of VAT, the length of a difference,", 0, above=True)
        if self.unlabelled is not None:
            number(self.unlabelled, "unlabelled of VAT, a label,", 0, whole=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x, y) + alpha * KL(p(x) || p(x + r)), means over the batch; a term of weight zero is not computed."""
        if self.alpha == 0:
            return self._clean(classify(model, x), y)
        room = context.around(self)
        points = context.once(lambda: self.points(model, x, room))
        logits = classify(model, x)
        apart = divergence(logits.detach().log_softmax(1), classify(model, points).log_softmax(1)).mean()
        return self._clean(logits, y) + self.alpha * apart

    def _clean(self, logits: Tensor, y: Tensor) -> Tensor:
        """J(x, y), mean over the rows with a label; zero where there are none."""
        if self.unlabelled is None:
            return F.cross_entropy(logits, y)
        known = y != self.unlabelled
        return F.cross_entropy(logits[known], y[known], reduction="sum") / known.sum().clamp(min=1)

    def points(self, model: nn.Module, x: Tensor, room: Room) -> Tensor:
        """x + r, in region and box; the model is in eval mode meanwhile."""
        region = room.threat.region
        g, d = x, room.normal(x)
        with evaluating(model):
            with torch.no_grad():
                here = classify(model, x).log_softmax(1)
            for _ in range(self.iterations):
                near = x + self.xi * _unit(d)
                g = slope(lambda point: divergence(here, classify(model, point).log_softmax(1)), near)
                d = region.steepest(g)
        return region.extreme(g, x, room.radii(x), room.threat.box)


def _unit(d: Tensor) -> Tensor:
    """Each row over its Euclidean length; zero stays zero."""
    return F.normalize(d.flatten(1), dim=1, eps=torch.finfo(d.dtype).tiny).view_as(d)
