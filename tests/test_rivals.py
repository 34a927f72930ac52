"""The rival classes of a row: who comes into question, whose boundary is linearised, and models that may reject an input."""

from __future__ import annotations

import math

import pytest
import torch
from core_models import Linear, inputs
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs.attacks import FAB, DeepFool, Job, Outcome, SuperDeepFool, TrustRegion
from mohs.attacks._rivals import candidates, pairs
from mohs.problem import Problem

WALKERS = [DeepFool(), FAB(steps=40), SuperDeepFool(), TrustRegion()]
each_walker = pytest.mark.parametrize("attack", WALKERS, ids=lambda a: type(a).__name__)


class Rejecting(Job):
    """A job whose model rejects an input by its logit number 1."""

    def problem(self, example: Tensor, number: Tensor) -> Problem:
        problem = super().problem(example, number)
        problem.goal.reject = 1
        return problem


def run(attack: object, model: nn.Module, x: Tensor, y: Tensor, threat: str, **settings: object) -> Outcome:
    job = Rejecting(attack, model, x, y, Threat.parse(threat), **settings)
    list(job.run())
    return job.outcome()


class Guarded(nn.Module):
    """Along the first number: class 0 up to 0.1, then the rejection up to 0.7, then class 2; class 3 wins nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        t = x[:, 0]
        return torch.stack([0 * t, t - 0.1, 2 * t - 0.8, 0.1 * t - 3.0], 1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@each_walker
def test_a_rejected_input_is_not_walked_to_but_walked_across(attack: object, norm: str) -> None:
    x, y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    x[1, 0], x[2, 0] = 0.05, 0.3  # the last is rejected from the start
    out = run(attack, Guarded(), x, y, f"{norm}:inf in [-inf, inf]")
    assert Guarded()(out.x).argmax(1).tolist() == [2, 2, 2]
    torch.testing.assert_close(out.size, torch.tensor([0.7, 0.65, 0.4]), rtol=0.05, atol=0)
    assert bool((out.size >= torch.tensor([0.7, 0.65, 0.4]) * (1 - 1e-4)).all())


@each_walker
def test_without_a_class_beside_the_rejection_nothing_is_found(attack: object) -> None:
    net, x = Linear(6, 2), inputs(8, 6)
    out = run(attack, net, x, torch.zeros(8, dtype=torch.int64), "l2:inf")
    assert not out.success.any()
    assert out.x.isfinite().all()


@each_walker
def test_the_rejection_can_be_a_target_and_can_be_left(attack: object) -> None:
    net, x = Linear(6, 3), inputs(16, 6)
    y = net(x).argmax(1)
    free, box = y != 1, "l2:inf in [-inf, inf]"
    reached = run(attack, net, x[free], y[free], box, targets=torch.ones(int(free.sum()), dtype=torch.int64))
    assert bool((net(reached.x).argmax(1) == 1).all())
    left = run(attack, net, x[~free], y[~free], box)
    assert left.success.all()
    torch.testing.assert_close(left.size, mohs.attack(attack, net, x[~free], y[~free], box).size)


def test_candidates_are_the_highest_other_logits() -> None:
    x, y = inputs(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    net = Linear(4, 5)
    job = Job(DeepFool(), net, x, y, Threat.parse("l2:inf"))
    index = torch.arange(6)
    problem = job.problem(index, torch.zeros_like(index))
    view = problem.linearize(x)
    ranked = view.logits.scatter(1, y.unsqueeze(1), -math.inf).argsort(dim=1, descending=True)
    assert torch.equal(candidates(problem, view, 3), ranked[:, :3])
    assert torch.equal(candidates(problem, view, 9), ranked[:, :4])
    raised, lowered = pairs(problem, view, ranked[:, :3])
    assert torch.equal(raised, ranked[:, :3])
    assert torch.equal(lowered, y.unsqueeze(1).expand(6, 3))
