"""Checks of what a run would say if it were made again: company, chance, and numbers of examples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core_models import inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.evaluation.checks import _repeat
from mohs.evaluation.plans import Plan, PlanStep
from mohs.records.rows import SCORE
from mohs.threat import Threat

SHAPE = (1, 4, 4)


class Coupled(nn.Module):
    """Answers that hang on the batch, on attacked inputs alone, where no check before the plan looks."""

    def __init__(self, clean: Tensor, share: float) -> None:
        super().__init__()
        self.net, self.clean, self.share = relu_net(SHAPE), clean, share

    def forward(self, x: Tensor) -> Tensor:
        apart = (x.flatten(1).unsqueeze(1) - self.clean.flatten(1)).abs().amax(2)
        moved = apart.amin(1, keepdim=True) > 1e-4
        z = self.net(x)
        return z - self.share * moved * z.flip(0)


@pytest.mark.parametrize(("share", "severity"), [(1.0, "info"), (0.0, "ok")])
def test_company_that_decides_who_is_broken_is_seen(share: float, severity: str) -> None:
    x = inputs(32, *SHAPE, seed=2)
    model = Coupled(x, share).eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    plan = Plan("short", (PlanStep.make("PGD", {"steps": 8}),))
    record = mohs.evaluate(model, (x, y), "linf:0.02", plan=plan, adaptive="off", batch=8, control=12)
    (seen,) = [f for f in record.header.checks if f.id == "repeatable"]
    assert seen.severity == severity
    assert "with the same seed" in seen.saw
    assert 0 < record.robust_accuracy < 1


@pytest.mark.parametrize(
    ("wrong", "severity"), [([0] * 6 + [20] * 6, "info"), ([0] * 6 + [20] * 5 + [19], "ok"), ([0] * 9, "info")]
)
def test_draws_that_never_disagree_are_no_chance(wrong: list[int], severity: str) -> None:
    count = len(wrong)
    draws = SimpleNamespace(
        attack=np.array([SCORE] * 3 + [0] * (count - 3)), drawn=np.full(count, 20), wrong=np.array(wrong)
    )
    review = SimpleNamespace(threat=Threat.parse("linf:0.1"), upto=1, attacks=[0], record=SimpleNamespace(draws=draws))
    assert _repeat.chance(review).severity == "ok", "one draw decides"
    review.threat = Threat(review.threat.region, draws=20)
    seen = _repeat.chance(review)
    assert seen.severity == severity
    assert ("not tested" in seen.saw) == (count < _repeat.POINTS)


@pytest.mark.parametrize(("n", "severity"), [(100, "info"), (450, "ok")])
def test_few_examples_tell_little(n: int, severity: str) -> None:
    seen = _repeat.resolution(SimpleNamespace(alive=np.arange(n) < n // 2, record=SimpleNamespace(n=n)))
    assert seen.severity == severity
    assert f"with {n} examples" in seen.saw
