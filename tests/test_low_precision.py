"""Nets in low precision: as guides they lead, and the net in float32 judges; as models they are evaluated as any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from core_models import inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.attacks import APGD, PGD

EPS = 0.1


class Low(nn.Module):
    """The net in bfloat16 where autocast allows it, on images in channels-last order; its classes may be shifted."""

    def __init__(self, net: nn.Module, shift: int = 0) -> None:
        super().__init__()
        self.net, self.shift = net.to(memory_format=torch.channels_last), shift

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.net(x.contiguous(memory_format=torch.channels_last)).float()
        return logits.roll(self.shift, 1)


class Garbage(nn.Module):
    """Logits that belong to no image, with gradients all the same: by the bits of each number alone."""

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.arange(1, 11, dtype=x.dtype) * 97
        return torch.sin(x.flatten(1).sum(1, keepdim=True) * waves) * 10


class Cast(nn.Module):
    """The net with weights, activations and logits of a low precision."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype))


@pytest.fixture(scope="module")
def images() -> mohs.data.Dataset:
    return mohs.data.load("bundled:fashion-mnist", n=48)


def fashion() -> nn.Module:
    return mohs.models.load("bundled:fashion-pgd").eval()


def led(attack: Any, data: mohs.data.Dataset, guide: nn.Module | None) -> mohs.attacks.Outcome:
    """What the attack finds, each success of which the net in float32 confirms, inside region and box."""
    net, region = fashion(), mohs.Linf(EPS)
    out = mohs.attack(attack, net, data.x, data.y, mohs.Threat(region), guide=guide, batch=48)
    with torch.no_grad():
        wrong = net(out.x).argmax(1) != data.y
    assert bool(wrong[out.success].all()), "the net in float32 answers rightly"
    assert bool(region.contains(out.x, data.x, torch.full((len(data.x),), EPS)).all())
    assert bool(((out.x >= 0) & (out.x <= 1)).all())
    return out


@pytest.mark.parametrize("attack", [PGD(steps=10), APGD(steps=12)], ids=repr)
def test_a_guide_in_bfloat16_leads_as_the_net_itself_does(attack: Any, images: mohs.data.Dataset) -> None:
    own, other = led(attack, images, None), led(attack, images, Low(fashion()))
    assert 6 < int(own.success.sum()) < 42
    assert abs(int(own.success.sum()) - int(other.success.sum())) <= 3
    assert not torch.equal(own.x, other.x), "the guide has gradients of its own"


@pytest.mark.parametrize("guide", [Low(fashion(), shift=1), Garbage()], ids=["shifted", "garbage"])
@pytest.mark.parametrize("attack", [PGD(steps=10), APGD(steps=12)], ids=repr)
def test_a_guide_that_is_wrong_everywhere_makes_no_success_of_its_own(
    attack: Any, guide: nn.Module, images: mohs.data.Dataset
) -> None:
    with torch.no_grad():
        said, before = guide(images.x).argmax(1) != images.y, fashion()(images.x).argmax(1) != images.y
    assert int((said & ~before).sum()) > 24, "it calls most clean images broken"
    out = led(attack, images, guide)
    assert int(out.success.sum()) < 42


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_low_precision_is_evaluated(dtype: torch.dtype) -> None:
    x, model = inputs(16, 1, 4, 4), Cast(relu_net((1, 4, 4)), dtype).eval()  # small: a CPU is slow at these types
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    record = mohs.evaluate(model, (x, y), "linf:0.06", plan="quick", control=8)
    assert record.header.status == "complete"
    assert record.clean_accuracy == 15 / 16
    lead = model(x).detach().double()
    own = lead.gather(1, y.unsqueeze(1)).squeeze(1)
    best = lead.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    assert record.examples.clean_margin.tolist() == pytest.approx((own - best).tolist(), rel=1e-6)
    broken: set[int] = set()
    for index in record.attacks:
        rows = record.results(index)
        if not rows.success.any():
            continue
        ids, points = record.points(index, rows.example[rows.success])
        assert bool((model(torch.from_numpy(points)).argmax(1) != y[ids]).all())
        assert float(np.abs(points - x.numpy()[ids]).max()) <= 0.06 * (1 + 1e-5)
        broken |= set(ids.tolist())
    assert 0 < len(broken) == round(16 * (record.clean_accuracy - record.robust_accuracy)) < 15
