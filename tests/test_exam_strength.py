"""The exam on a real model: plans pass it, and attacks that are known to be weak do not."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import mohs
from mohs import objectives
from mohs.attacks import PGD
from mohs.evaluation.exam import Exam


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.by


def fashion(attack: Any, wrap: float | None = None, n: int = 4) -> Exam:
    net = mohs.models.load("bundled:fashion-natural")
    data = mohs.data.load("bundled:fashion-mnist", n=16)
    model = net if wrap is None else Scaled(net, wrap)
    return mohs.exam(model, data, "linf:0.1", attack, n=n, inner=299, looks=20)


@pytest.mark.parametrize("plan", ["quick", "standard"])
def test_plans_pass(plan: str) -> None:
    result = fashion(plan)
    assert (result.passed, result.found, result.tested) == (True, 4, 4)
    assert result.finding.severity == "ok"


@pytest.mark.parametrize(
    "attack",
    [PGD(steps=5), PGD(steps=40, step_size=0.1 / 200)],
    ids=["few steps", "small steps"],
)
def test_weak_attacks_fail(attack: Any) -> None:
    result = fashion(attack)
    assert not result.passed
    assert result.rate < 0.8
    assert result.finding.severity == "warn"


def test_saturated_logits_fail_the_loss_they_blind() -> None:
    """The logits' scale is kept: the plain cross-entropy has no gradient where the scaled one goes on."""
    blind = fashion(PGD(steps=40, objective=objectives.plain_cross_entropy), 100.0)
    seeing = fashion(PGD(steps=40), 100.0)
    assert blind.found == 0
    assert seeing.passed
