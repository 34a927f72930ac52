"""Guides with other logits than the model: without the rejection they still lead, anything else is refused in words."""

from __future__ import annotations

import pytest
import torch
from core_models import Linear, inputs
from torch import Tensor, nn

import mohs
from mohs.attacks import APGD, DDN, PGD, DeepFool
from mohs.errors import DataError, ModelError
from mohs.objectives import dlr, margin, plain_cross_entropy
from mohs.problem import Goal
from mohs.target import Target

CLASSES = 4


class Wary(nn.Module):
    """A classifier that rejects inputs whose mean is above a threshold, by a last logit."""

    def __init__(self, net: nn.Module, above: float) -> None:
        super().__init__()
        self.net, self.above = net, above

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.cat([z, (z.amax(1) + 100 * (x.mean(1) - self.above)).unsqueeze(1)], 1)


def problem() -> tuple[Linear, Tensor, Tensor]:
    net, x = Linear(12, CLASSES), inputs(24, 12)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize(
    "attack", [PGD(steps=10), PGD(steps=10, objective=margin), APGD(steps=10), APGD(steps=10, objective=dlr)]
)
def test_the_net_inside_leads_as_if_alone_where_nothing_is_rejected(attack: object) -> None:
    net, x, y = problem()
    alone = mohs.attack(attack, net, x, y, "linf:0.1", batch=24, stop=mohs.Stop.BUDGET)
    led = mohs.attack(
        attack, Wary(net, 2.0), x, y, "linf:0.1", batch=24, stop=mohs.Stop.BUDGET, guide=net, reject=CLASSES
    )
    assert 0 < int(alone.success.sum()) < len(x)
    assert torch.equal(led.success, alone.success)
    assert torch.allclose(led.x, alone.x, atol=1e-5)


@pytest.mark.parametrize("attack", [DeepFool(), DDN(steps=20)])
def test_so_do_attacks_for_the_smallest_change(attack: object) -> None:
    net, x, y = problem()
    alone = mohs.attack(attack, net, x, y, "l2:inf", batch=24)
    led = mohs.attack(attack, Wary(net, 2.0), x, y, "l2:inf", batch=24, guide=net, reject=CLASSES)
    assert bool(led.success.all())
    assert torch.allclose(led.size, alone.size, rtol=1e-3)


def test_what_the_model_rejects_is_no_success_though_the_guide_says_so() -> None:
    net, x, y = problem()
    led = mohs.attack(PGD(steps=10), Wary(net, -1.0), x, y, "linf:0.1", guide=net, reject=CLASSES)
    assert not bool(led.success.any())


def test_the_logit_that_is_added_has_no_part_in_margin_likelihood_or_gradient() -> None:
    net, x, y = problem()
    target = Target(Wary(net, 2.0), guide=net)
    goal = Goal.leave(y, reject=CLASSES)
    z = net(x).detach().requires_grad_(True)
    filled = target._fitting(z, goal)
    assert filled.shape == (len(x), CLASSES + 1)
    assert torch.equal(goal.margin(filled), Goal.leave(y).margin(z))
    value, cotangent = plain_cross_entropy(filled.detach(), goal)
    assert torch.allclose(value, torch.nn.functional.cross_entropy(z, y, reduction="none"), rtol=1e-6)
    (g,) = torch.autograd.grad(filled, z, cotangent)
    assert torch.allclose(g, z.detach().softmax(1) - nn.functional.one_hot(y, CLASSES), atol=1e-6)
    whole = torch.zeros(len(x), CLASSES + 1)
    assert target._fitting(whole, goal) is whole


def test_a_guide_that_cannot_reject_does_not_lead_to_a_rejection() -> None:
    net, x, y = problem()
    with pytest.raises(ModelError, match=r"guide answers with 4 logits; the model rejects by logit 4.*to be rejected"):
        mohs.attack(
            PGD(steps=3),
            Wary(net, 2.0),
            x,
            y,
            "linf:0.1",
            guide=net,
            reject=CLASSES,
            targets=torch.full_like(y, CLASSES),
        )


def test_a_guide_that_lacks_classes_as_well() -> None:
    net, x, y = problem()
    with pytest.raises(ModelError, match="guide answers with 3 logits; the model rejects by logit 4"):
        mohs.attack(PGD(steps=3), Wary(net, 2.0), x, y % 3, "linf:0.1", guide=Linear(12, 3), reject=CLASSES)


@pytest.mark.parametrize("classes", [3, 6])
def test_other_numbers_of_classes_are_refused_once_the_model_is_asked(classes: int) -> None:
    net, x, y = problem()
    with pytest.raises(ModelError, match=f"guide answers with {classes} logits and the model with 4"):
        mohs.attack(PGD(steps=30), net, x, y % 3, "linf:0.5", guide=Linear(12, classes, seed=1))


def test_labels_that_the_guide_lacks() -> None:
    net, x, y = problem()
    with pytest.raises(DataError, match="below the guide's 2 classes"):
        mohs.attack(PGD(steps=3), net, x, y, "linf:0.1", guide=Linear(12, 2))
