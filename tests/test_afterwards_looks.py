"""What the looks after a plan share: how many rows they afford, their draws, and the model without its defense."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_models import inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD
from mohs.evaluation import _inner
from mohs.evaluation.checks import _review
from mohs.evaluation.checks._review import Review
from mohs.threat import Threat

N, SHAPE = 32, (1, 4, 4)


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = inputs(N, *SHAPE, seed=5)
    with torch.no_grad():
        return x, model(x).argmax(1)


def test_a_later_look_is_no_weaker_than_the_first() -> None:
    first, later = object.__new__(Review), object.__new__(Review)
    first.thorough, later.thorough = False, True
    for spent, rows in (
        (0, (6, 6)),
        (1000, (6, 10)),
        (8000, (8, 16)),
        (10**6, (16, 16)),
    ):  # at most a tenth of the plan
        first.spent = later.spent = spent
        assert (first.afford(10, most=16), later.afford(10, most=16)) == rows


def test_a_check_confirms_on_draws_of_its_own_and_averages_as_the_plan_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lead = x.flatten(1).sum(1) - 2 + 0.01 * torch.randn(len(x))
            return torch.stack([torch.zeros_like(lead), lead], 1)

    asked: list[dict[str, Any]] = []
    averages: list[Any] = []

    def confirm(model: nn.Module, x: Tensor, *args: Any, **settings: Any) -> Tensor:
        asked.append(settings)
        return torch.ones(len(x), dtype=torch.bool)

    class Looked(_review.Job):
        def __init__(self, *args: Any, average: Any, **settings: Any) -> None:
            averages.append(average)
            super().__init__(*args, average=average, **settings)

    monkeypatch.setattr(_review, "confirm", confirm)
    monkeypatch.setattr(_review, "Job", Looked)
    x = torch.full((8, 1, 2, 2), 0.49)
    review = object.__new__(Review)
    review.threat, review.upto, review.passes, review.finds = Threat(mohs.Linf(0.1), draws=20), 3, 0, []
    review.run = SimpleNamespace(
        guide=None, average=lambda index: 10 * index, settings=SimpleNamespace(reject=None), model=Noisy().eval(), x=x,
        y=torch.zeros(8, dtype=torch.int64), threat=review.threat, seed=0, batch=8,
    )  # fmt: skip
    rows = torch.tensor([7, 2, 5])
    for other in (0, 1):
        assert review.tried(PGD(steps=2), rows, other=other).success.all()
    assert averages == [30, 30]
    assert [settings["ids"].tolist() for settings in asked] == [rows.tolist()] * 2
    assert len({settings["seed"] for settings in asked} | {0}) == 3


def test_what_is_left_out_must_leave_a_classifier() -> None:
    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    net = relu_net(SHAPE)
    model = nn.Sequential(Negative(), Negative(), net).eval()
    x, y = data(model)
    inner = _inner.undefended(model, x, y, believe=True)
    assert inner is not None
    assert inner[1] == "layer 0, layer 1"
    assert torch.equal(inner[0](x), net(x))
    assert _inner.undefended(nn.Sequential(Negative(), net).eval(), x, net(-x).argmax(1), believe=True) is None
    assert _inner.undefended(net, x, y, believe=True) is None
