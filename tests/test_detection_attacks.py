"""Orthogonal, selective and weighted PGD: each half of the goal by itself, on models whose gradients are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_models import inputs, relu_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs import Goal
from mohs.attacks import PGD, LogitMatching, OrthogonalPGD, WeightedPGD
from mohs.attacks._detection import two_goals
from mohs.attacks.logit_matching import _other
from mohs.attacks.orthogonal_pgd import without
from mohs.attacks.weighted_pgd import WeightedState
from mohs.errors import UsageError
from mohs.evaluation._others import nearest_others
from mohs.evaluation.plans import Plan, PlanStep
from mohs.objectives import margin

ALL = [OrthogonalPGD(steps=200), OrthogonalPGD(steps=200, orthogonal=False), WeightedPGD(steps=200, rounds=4)]


class Narrow(nn.Module):
    """Two classes told apart by the first coordinate; rejected where the second leaves its usual course.

    The way to the other class by the steepest ascent of the classes' margin leads far into the rejection.
    """

    def __init__(self, pull: float) -> None:
        super().__init__()
        self.pull = pull
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        gap = a + self.pull * b
        classes = torch.stack([-gap, gap], 1)
        return torch.cat([classes, (classes.amax(1) + 20 * (b.abs() - 0.05)).unsqueeze(1)], 1) + 0 * self.weight


def logits(n: int = 6, k: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 2**31), reach=st.booleans())
@settings(max_examples=30, deadline=None)
def test_both_halves_are_met_exactly_where_the_goal_is(seed: int, reach: bool) -> None:
    z, label = logits(seed=seed), torch.tensor([0, 1, 2, 3, 0, 1])
    goal = Goal.attain(label, reject=4) if reach else Goal.leave(label, reject=4)
    classes, detector = two_goals(z, goal)
    assert detector is not None
    met = (classes.value > 0) & (detector.value > 0)
    assert torch.equal(met, goal.margin(z) > 0)
    assert torch.equal((classes.value > 0), Goal(label, goal.reach, goal.aim).margin(z[:, :4]) > 0)
    for half in (classes, detector):
        assert torch.allclose((half.cotangent * z).sum(1), half.value)


def test_being_rejected_may_be_the_goal() -> None:
    z = logits(1, 3)
    classes, detector = two_goals(z, Goal.attain(torch.tensor([2]), reject=2))
    assert detector is not None
    assert torch.allclose(classes.value, z[:, 2] - z[:, :2].amax(1))
    assert float(detector.value) == math.inf
    assert torch.equal(detector.cotangent, classes.cotangent)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_what_is_left_of_a_gradient_is_orthogonal_to_the_other(seed: int) -> None:
    g, other = logits(4, 7, seed=seed), logits(4, 7, seed=seed + 1)
    rest = without(g, other)
    assert torch.allclose((rest * other).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    along = g - rest
    assert torch.allclose(along * other.norm(dim=1, keepdim=True) ** 2, other * (along * other).sum(1, keepdim=True))


def test_parallel_and_vanishing_gradients_leave_the_wanted_one() -> None:
    g = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    other = torch.tensor([[-2.0, -4.0], [0.0, 0.0], [1.0, 0.0]])
    assert torch.equal(without(g, other), g)


@pytest.mark.parametrize("attack", ALL, ids=lambda a: repr(a)[:24])
def test_the_narrow_way_past_a_detector_is_found(attack: mohs.attacks.Attack) -> None:
    x, y = torch.tensor([[0.2, 0.5], [0.3, 0.5]]) - torch.tensor([0.7, 0.5]), torch.zeros(2, dtype=torch.int64)
    net = Narrow(pull=3.0).eval()
    assert torch.equal(net(x).argmax(1), y)
    found = mohs.attack(attack, net, x, y, "linf:0.6 in [-1, 1]", reject=2, restarts=4)
    assert bool(found.success.all())
    assert torch.equal(net(found.x).argmax(1), 1 - y)
    assert bool((found.x[:, 1].abs() < 0.05).all())


def test_orthogonal_steps_leave_the_detector_where_it_is() -> None:
    """On linear margins the first step of an L2 ball is the projected gradient itself."""
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.2, 1.0]], dtype=torch.float64)
    net = nn.Linear(3, 3, bias=False, dtype=torch.float64).eval()
    net.weight.data.copy_(weight)
    x = torch.tensor([[0.9, 0.1, 0.3]], dtype=torch.float64)
    attack = OrthogonalPGD(steps=1, step_size=0.1, random_start=False)
    found = mohs.attack(attack, net, x, torch.tensor([0]), "l2:0.1 in [-inf, inf]", reject=2)
    classes, detector = weight[1] - weight[0], weight[0] - weight[2]
    rest = classes - detector * (classes @ detector) / (detector @ detector)
    assert torch.allclose(found.x - x, 0.1 * rest / rest.norm(), atol=1e-9)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_without_a_rejection_it_is_pgd_on_the_margin(orthogonal: bool) -> None:
    net, x = relu_net((1, 4, 4)), inputs(12, 1, 4, 4)
    y = net(x).argmax(1)
    ours, same = (
        mohs.attack(attack, net, x, y, "linf:0.05")
        for attack in (
            OrthogonalPGD(steps=40, random_start=False, orthogonal=orthogonal),
            PGD(steps=40, random_start=False, objective=margin),
        )
    )
    assert torch.equal(ours.x, same.x)
    assert torch.equal(ours.forwards, same.forwards)


def test_selective_takes_half_of_the_backwards() -> None:
    net, x = Narrow(pull=30.0).eval(), torch.tensor([[-0.9, 0.0]])
    y = torch.zeros(1, dtype=torch.int64)
    both, one = (
        mohs.attack(OrthogonalPGD(steps=10, orthogonal=o), net, x, y, "linf:0.01 in [-1, 1]", reject=2)
        for o in (True, False)
    )
    assert int(both.backwards) == 2 * int(one.backwards) == 20


def test_the_weight_is_doubled_halved_and_then_bisected() -> None:
    def state(weight: float, low: float, high: float, fooled: bool) -> WeightedState:
        x = torch.zeros(1, 2)
        return WeightedState(
            x=x + 1, begin=x, weight=torch.tensor([weight]), low=torch.tensor([low]), high=torch.tensor([high]),
            fooled=torch.tensor([fooled]),
        )  # fmt: skip

    for before, after in (
        ((1.0, 0.0, math.inf, True), 2.0),  # fooled, but rejected: more weight for the detector
        ((1.0, 0.0, math.inf, False), 0.5),
        ((4.0, 1.0, math.inf, False), 2.0),
        ((1.0, 0.0, 4.0, True), 2.0),
    ):
        found = WeightedPGD._next_round(state(*before))
        assert float(found.weight) == after
        assert torch.equal(found.x, found.begin)


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"weight": 0.0}, {"weight": math.inf}, {"steps": 0}, {"step_size": -1}]
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="WeightedPGD's"):
        WeightedPGD(**wrong)


# ---- matching of logits -----------------------------------------------------------------------------------------


def test_the_logits_of_an_example_are_reached_where_they_can_be() -> None:
    """A linear model with an inverse: the point with the example's logits is the example, brought into the region."""
    net = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.linalg.qr(logits(4, 4, seed=3)).Q)  # then nearest logits are nearest points
    x, y = torch.full((3, 4), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    start = 0.5 + torch.linspace(-0.2, 0.2, 12, dtype=torch.float64).view(3, 4).flip(1)
    found = mohs.attack(
        LogitMatching(steps=300, step_size=0.002), net, x, y, "linf:0.1", start=start, stop=mohs.Stop.BUDGET
    )
    reached = net(start).argmax(1) != 0
    assert bool(reached.any())
    assert torch.allclose(found.x[reached], start.clamp(0.4, 0.6)[reached], atol=0.005)


def test_without_an_example_the_winners_change_places() -> None:
    z = torch.tensor([[3.0, 1.0, 2.0, -5.0]])
    assert _other(z, Goal.leave(torch.tensor([0]), reject=3)).tolist() == [[2.0, 1.0, 3.0, -5.0]]
    assert _other(z, Goal.leave(torch.tensor([0]), torch.tensor([1]), reject=3)).tolist() == [[1.0, 3.0, 2.0, -5.0]]
    assert _other(z, Goal.attain(torch.tensor([1]))).tolist() == [[1.0, 3.0, 2.0, -5.0]]
    assert torch.equal(_other(z, Goal.leave(torch.tensor([1]))), z), "answers otherwise as it is"
    rejected = torch.tensor([[3.0, 1.0, 2.0, 5.0]])
    assert _other(rejected, Goal.leave(torch.tensor([0]), reject=3)).tolist() == [[2.0, 1.0, 3.0, 5.0]]


class Odds(nn.Module):
    """Rejects what is surer of its answer than clean inputs are: climbing the margin is what it waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = relu_net((1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = 20 * self.net(x)
        top = z.topk(2, 1).values
        return torch.cat([z, (top[:, :1] + 20 * ((top[:, :1] - top[:, 1:]) - 3.0))], 1)


def test_a_detector_of_margins_sees_nothing_in_the_logits_of_an_example() -> None:
    model, x = Odds().eval(), inputs(64, 1, 4, 4, seed=9)
    with torch.no_grad():
        answers = model(x).argmax(1)
    right = (answers < 4).nonzero().squeeze(1)
    assert len(right) > 20
    x, y = x[right], answers[right]
    start = torch.stack([x[y != label][0] for label in y])
    found = mohs.attack(LogitMatching(steps=60), model, x, y, "linf:0.3", start=start, reject=4)
    assert found.success.double().mean() > 0.9


def test_a_plan_begins_at_the_nearest_example_of_another_class() -> None:
    net, x = relu_net((1, 4, 4)), inputs(24, 1, 4, 4, seed=2)
    with torch.no_grad():
        y = net(x).argmax(1)
    run: Any = SimpleNamespace(
        x=x, y=y, classes=4, threat=mohs.Threat.parse("linf:0.02"), settings=SimpleNamespace(reject=3)
    )
    made: Any = SimpleNamespace(examples=SimpleNamespace(clean_label=y.numpy()))
    found = nearest_others(run, torch.arange(24), made)
    for row in range(24):
        able = [i for i in range(24) if y[i] != y[row] and y[i] != 3]
        nearest = min(able, key=lambda i: float((x[i] - x[row]).abs().max()))
        assert torch.equal(found[row], x[nearest])
    still = Plan("one", (PlanStep.make("PGD", {"steps": 1, "step_size": 1e-9}, start="other"),))
    record = mohs.evaluate(net, (x, y), "linf:0.3", plan=still, adaptive="off", control=0)
    run.settings.reject = None
    found = nearest_others(run, torch.arange(24), made)
    begun = (found - x).clamp(-0.3, 0.3) + x
    with torch.no_grad():
        won = (net(begun.clamp(0, 1)).argmax(1) != y).numpy()
    assert 0 < won.sum() < 24
    assert (record.survived == ~won).all(), "an attack that stands still answers what its start does"
