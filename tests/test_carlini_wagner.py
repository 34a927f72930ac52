"""Carlini-Wagner, L-BFGS and EAD against exact distances, scipy, and what public implementations get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from core_models import Linear, inputs, relu_net
from scipy.optimize import minimize
from torch import Tensor, nn

import mohs
from mohs.attacks import EAD, LBFGS, CarliniWagner
from mohs.attacks._adam import Adam, to_point, to_variable
from mohs.errors import ThreatError, UsageError
from mohs.objectives import likelihood
from mohs.problem import Goal

FREE = " in [-inf, inf]"
ALL = [(CarliniWagner(steps=150), "l2"), (CarliniWagner(steps=200), "linf"), (LBFGS(), "l2"), (EAD(steps=200), "l1")]
each_one = pytest.mark.parametrize(("attack", "norm"), ALL, ids=["CW-l2", "CW-linf", "LBFGS-l2", "EAD-l1"])
SLACK = {"l2": 1.02, "linf": 1.05, "l1": 1.1}
DUAL = {"l2": 2.0, "linf": 1.0, "l1": math.inf}


def shortest(model: Linear, x: Tensor, y: Tensor, norm: str, box: tuple[float, float]) -> Tensor:
    """Exact smallest change: the nearest of the planes, inside the box."""
    region = mohs.Threat.parse(f"{norm}:inf").region
    best = torch.full((len(x),), math.inf, dtype=x.dtype)
    z = model(x).detach()
    for k in range(z.shape[1]):
        w = (model.weight[:, k] - model.weight[:, y].T).detach()
        gap = z.gather(1, y.unsqueeze(1)).squeeze(1) - z[:, k]
        change = region.shortest(w, gap, x, box)
        reached = (w * change).sum(1) >= gap * (1 - 1e-6)
        size = region.measure(x + change, x).masked_fill(~reached | (y == k), math.inf)
        best = torch.minimum(best, size)
    return best


# --- linear models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@each_one
def test_near_the_optimum_of_linear_models(attack: object, norm: str, classes: int) -> None:
    model, x = Linear(20, classes, dtype=torch.float64), inputs(32, 20, dtype=torch.float64)
    x[:, ::3] = x[:, ::3].round()  # a third of the numbers at a bound
    y = model(x).argmax(1)
    for box, words in (((0.0, 1.0), ""), ((-math.inf, math.inf), FREE)):
        out = mohs.attack(attack, model, x, y, f"{norm}:inf{words}", batch=32)
        exact = shortest(model, x, y, norm, box)
        assert torch.equal(out.success, exact.isfinite())
        ratio = (out.size / exact)[exact.isfinite()]
        assert float(ratio.min()) > 1 - 1e-5
        assert float(ratio.median()) < SLACK[norm], words


@each_one
def test_targets(attack: object, norm: str) -> None:
    model, x = relu_net((12,)), inputs(24, 12)
    y = model(x).argmax(1)
    targets = (y + 1) % 4
    plain = mohs.attack(attack, model, x, y, f"{norm}:inf", targets=targets)
    assert float(plain.success.float().mean()) > 0.8
    assert bool((model(plain.x).argmax(1) == targets)[plain.success].all())


@each_one
def test_the_confidence_moves_the_boundary(attack: object, norm: str) -> None:
    model, x = Linear(20, 2, dtype=torch.float64), inputs(16, 20, dtype=torch.float64)
    y = model(x).argmax(1)
    near, far = (mohs.attack(attack, model, x, y, f"{norm}:inf" + FREE, confidence=c) for c in (0.0, 2.0))
    assert far.success.all()
    assert bool((Goal.leave(y).margin(model(far.x).detach()) >= 2.0).all())
    gap = -Goal.leave(y).margin(model(x).detach())  # the distance grows as the gap to be crossed
    torch.testing.assert_close((far.size / near.size).median(), ((gap + 2.0) / gap).median(), rtol=0.05, atol=0)


# --- what public implementations get wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf", "l0"])
def test_numbers_at_a_bound_can_move(norm: str) -> None:
    # a tanh without care is infinite there: one library never moves a black or white pixel
    model, x = Linear(16, 3), inputs(24, 16).round()
    y = model(x).argmax(1)
    out = mohs.attack(CarliniWagner(steps=60), model, x, y, f"{norm}:inf")
    possible = shortest(model, x, y, "l2", (0.0, 1.0)).isfinite()
    assert torch.equal(out.success, possible)
    assert bool((out.x != x).flatten(1).any(1)[out.success].all())


@each_one
def test_negative_logits(attack: object, norm: str) -> None:
    # one library takes the maximum of logits times a mask, which is zero where all are negative
    model, x = relu_net((12,)), inputs(24, 12)
    y = model(x).argmax(1)
    plain = mohs.attack(attack, model, x, y, f"{norm}:inf")
    with torch.no_grad():
        model[-1].bias -= 100.0
    low = mohs.attack(attack, model, x, y, f"{norm}:inf")
    assert torch.equal(low.success, plain.success)
    assert float(plain.success.float().mean()) > 0.8
    torch.testing.assert_close(low.size.median(), plain.size.median(), rtol=0.1, atol=0)


@each_one
def test_a_stubborn_row_does_not_cut_the_others_short(attack: object, norm: str) -> None:
    # one library stops the whole batch when the sum of its losses rises
    model, x = relu_net((12,)), inputs(16, 12)
    y = model(x).argmax(1)
    alone = mohs.attack(attack, model, x[:8], y[:8], f"{norm}:inf", batch=16)
    among = mohs.attack(attack, model, torch.cat([x[:8], 0 * x[8:] + 0.5]), y, f"{norm}:inf", batch=16)
    assert torch.equal(among.x[:8], alone.x)


# --- each alone ------------------------------------------------------------------------------------------------------


def test_the_fewest_positions_of_a_linear_model() -> None:
    # one number of large weight suffices, but the L2 solution spreads over all of them
    weight = torch.full((12,), 0.3)
    weight[5] = 4.0
    model = nn.Linear(12, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([-weight, weight]))
        model.bias.copy_(torch.tensor([1.0, -1.0]) * float(weight.sum()) * 0.6)
    x = torch.full((4, 12), 0.5)
    out = mohs.attack(CarliniWagner(steps=300), model, x, torch.zeros(4, dtype=torch.int64), "l0-features:inf")
    assert out.success.all()
    assert out.size.tolist() == [1.0] * 4
    assert bool((out.x[:, 5] != 0.5).all())


def test_l0_counts_a_pixel_with_its_channels_once() -> None:
    model, x = relu_net((3, 4, 4)), inputs(8, 3, 4, 4)
    y = model(x).argmax(1)
    out = mohs.attack(CarliniWagner(steps=100), model, x, y, "l0:inf")
    changed = (out.x != x).any(1).flatten(1).sum(1)
    assert torch.equal(changed[out.success].float(), out.size[out.success])
    assert float(out.size.median()) <= 4


@each_one
def test_a_warm_start_is_where_the_descent_begins(attack: object, norm: str) -> None:
    model, x = relu_net((12,)), inputs(16, 12)
    y = model(x).argmax(1)
    cold = mohs.attack(attack, model, x, y, f"{norm}:inf")
    again = mohs.attack(replace(attack, steps=2), model, x, y, f"{norm}:inf", start=cold.x)
    assert bool((again.size <= cold.size * 1.001).all())
    # from far behind the boundary there is no gap to measure anything by, and still they come back
    far = x + 3 * (cold.x - x)
    back = mohs.attack(attack, model, x, y, f"{norm}:inf", start=far.clamp(0, 1))
    assert float((back.size / cold.size).median()) < 1.1


def test_the_variable_and_its_point_agree_and_stay_in_the_box() -> None:
    for box in ((0.0, 1.0), (-3.0, 255.0), (-math.inf, math.inf)):
        lo, hi = (0.0, 1.0) if math.isinf(box[0]) else box
        x = inputs(4, 50) * (hi - lo) + lo
        x[:, :5], x[:, 5:10] = lo, hi
        torch.testing.assert_close(to_point(to_variable(x, box), box), x, rtol=0, atol=1e-5 * (hi - lo))
        far = to_point(to_variable(x, box) + 3.0, box)
        assert bool(((far >= box[0]) & (far <= box[1])).all())


def test_adam_is_the_published_one() -> None:
    w = torch.nn.Parameter(inputs(3, 7, dtype=torch.float64))
    mine, adam = w.detach().clone(), Adam.fresh(w.detach())
    other = torch.optim.Adam([w], lr=0.05, eps=0.0)
    for k in range(6):
        gradient = torch.sin(w.detach() * (k + 1))
        w.grad = gradient
        other.step()
        change, adam = adam.move(gradient, torch.full((3,), 0.05, dtype=torch.float64))
        mine += change
        torch.testing.assert_close(mine, w.detach())
    assert adam.restart(torch.tensor([True, False, True])).age.tolist() == [0, 6, 0]


@pytest.mark.parametrize("targeted", [False, True])
def test_lbfgs_finds_what_scipy_finds(targeted: bool) -> None:
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Linear(10, 12, seed=1, dtype=torch.float64), Linear(12, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model, x = Smooth(), inputs(6, 10, dtype=torch.float64)
    y = model(x).argmax(1)
    goals = (y + 1) % 3 if targeted else y
    out = mohs.attack(LBFGS(steps=400, inner=40), model, x, y, "l2:inf", targets=goals if targeted else None)
    assert out.success.all()
    for i in range(len(x)):
        goal = Goal.attain(goals[i : i + 1]) if targeted else Goal.leave(y[i : i + 1])
        unit = 0.1 * goal.margin(model(x[i : i + 1]).detach()).abs()

        def best(c: float, i: int = i, goal: Goal = goal, unit: Tensor = unit) -> tuple[bool, float]:
            def function(v: np.ndarray) -> tuple[float, np.ndarray]:
                z = torch.from_numpy(v).unsqueeze(0).requires_grad_(True)
                logits = model(z)
                value, cotangent = likelihood(logits.detach(), goal, unit)
                (slope,) = torch.autograd.grad(logits, z, -cotangent)
                r = v - x[i].numpy()
                return float(r @ r + c * -value), 2 * r + c * slope[0].numpy()

            found = minimize(function, x[i].numpy(), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 10).x
            met = bool(goal.margin(model(torch.from_numpy(found).unsqueeze(0)).detach()) > 0)
            return met, float(np.linalg.norm(found - x[i].numpy()))

        low, high = 1e-4, 1e4
        for _ in range(40):
            c = math.sqrt(low * high)
            low, high = (low, c) if best(c)[0] else (c, high)
        assert float(out.size[i]) < 1.03 * best(high)[1]


@pytest.mark.parametrize("confidence", [0.0, 2.0])
@pytest.mark.parametrize("goal", [Goal.leave, Goal.attain], ids=["leave", "attain"])
def test_the_likelihood_and_its_derivative(goal: Callable[..., Goal], confidence: float) -> None:
    z = (3 * inputs(20, 4, dtype=torch.float64)).requires_grad_(True)
    label, unit = torch.arange(20) % 4, 0.1 + inputs(20, 1, dtype=torch.float64, seed=1).squeeze(1)
    p = (z / unit.unsqueeze(1)).softmax(1).gather(1, label.unsqueeze(1)).squeeze(1)
    won = p if goal == Goal.attain else 1 - p
    odds = (won / (1 - won)).log() - confidence / unit
    want = unit * nn.functional.logsigmoid(odds)
    (slope,) = torch.autograd.grad(want.sum(), z)
    value, cotangent = likelihood(z.detach(), goal(label, confidence=confidence), unit)
    torch.testing.assert_close(value, want.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cotangent, slope, rtol=1e-6, atol=1e-9)


def test_ead_leaves_most_coordinates_alone() -> None:
    model, x = relu_net((60,)), inputs(24, 60)
    y = model(x).argmax(1)
    sparse = mohs.attack(EAD(steps=200), model, x, y, "l1:inf")
    dense = mohs.attack(CarliniWagner(steps=100), model, x, y, "l2:inf")
    found = sparse.success & dense.success
    assert float(found.float().mean()) > 0.8
    assert float((sparse.x != x)[found].float().mean()) < 0.3
    assert float(sparse.size[found].median()) < 0.8 * float((dense.x - x).abs().sum(1)[found].median())


def test_settings_and_regions_are_checked() -> None:
    for make in (
        lambda: CarliniWagner(steps=0), lambda: CarliniWagner(inner=1.5), lambda: LBFGS(memory=0), lambda: EAD(step_size=1.0),
        lambda: EAD(beta=-1.0), lambda: EAD(inner=0),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            make()
    for attack, threat in ((CarliniWagner(), "l1:inf"), (LBFGS(), "linf:inf"), (EAD(), "l2:inf")):
        with pytest.raises(ThreatError):
            mohs.attack(attack, relu_net((6,)), inputs(2, 6), torch.zeros(2, dtype=torch.int64), threat)
