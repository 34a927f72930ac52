"""FAB: exact on linear models with and without box, small changes on curved ones, one forward per step."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from core_models import Counting, Linear, conv_net, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs.attacks import FAB, DeepFool, Job
from mohs.attacks._rivals import Boundary
from mohs.attacks.fab import FABState
from mohs.errors import UsageError
from mohs.problem import Problem

THREATS = ["linf:inf", "l2:inf", "l1:inf", "l3:inf"]


def optimum(net: Linear, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Exact smallest change to leave the class of a linear model, inside the box."""
    z, best = net(x).detach(), torch.full((len(x),), math.inf)
    for c in range(z.shape[1]):
        w = (net.weight[:, c] - net.weight[:, y].T).detach()
        gap = z.gather(1, y.unsqueeze(1)).squeeze(1) - z[:, c]
        r = threat.region.shortest(w, gap, x, threat.box)
        reached = ((w * r).sum(1) >= gap - 1e-5) & (y != c)
        size = threat.region.measure(x + r, x)
        best = torch.where(reached, torch.minimum(best, size), best)
    return best


@pytest.mark.parametrize("box", ["", " in [-inf, inf]"], ids=["box", "no box"])
@pytest.mark.parametrize("short", THREATS)
def test_exact_on_linear_models(short: str, box: str) -> None:
    net, x = Linear(12, 4), inputs(64, 12)
    y, threat = net(x).argmax(1), Threat.parse(short + box)
    out = mohs.attack(FAB(steps=40), net, x, y, threat)
    best = optimum(net, x, y, threat)
    assert out.success.all()
    assert bool((out.size >= best * (1 - 1e-4) - 1e-6).all())
    assert float((out.size / best).median()) < 1.002
    assert float((out.size / best).max()) < 1.05


@pytest.mark.parametrize("short", THREATS)
def test_smaller_than_deepfool_on_a_curved_net(short: str) -> None:
    net, x = conv_net(), inputs(48, 1, 12, 12)
    y = net(x).argmax(1)
    fab, deepfool = (mohs.attack(a, net, x, y, short) for a in (FAB(steps=30), DeepFool()))
    assert fab.success.all()
    assert float((fab.size / deepfool.size).median()) < 0.99


@pytest.mark.parametrize("region", [mohs.Linf(1.0), mohs.L2(1.0), mohs.L1(1.0)], ids=repr)
def test_the_rivals_is_reached_from_either_side(region: mohs.Linf) -> None:
    x, w = inputs(16, 8), inputs(16, 8, seed=1) - 0.5
    boundary = Boundary(x, w, torch.linspace(-0.3, 0.3, 16))
    z = 0.2 + 0.6 * inputs(16, 8, seed=2)
    there = z + boundary.shortest(z, region, (-math.inf, math.inf))
    torch.testing.assert_close((w * (there - x)).sum(1), boundary.gap, rtol=1e-4, atol=1e-5)


def test_one_forward_per_step_and_one_backward_per_target() -> None:
    net, x = relu_net((12,), classes=6), inputs(16, 12)
    y = net(x).argmax(1)
    model = Counting(net)
    targeted = mohs.attack(FAB(steps=12), model, x, y, "l2:inf", targets=(y + 1) % 6)
    assert model.forwards == 13
    assert model.backwards == 12
    assert bool((net(targeted.x).argmax(1) == (y + 1) % 6)[targeted.success].all())
    assert int(targeted.success.sum()) > 8


def test_aims_never_lose_to_the_first_aim() -> None:
    net, x = relu_net((12,), classes=6), inputs(32, 12)
    y = net(x).argmax(1)
    one, all_ = (mohs.attack(FAB(steps=20), net, x, y, "l2:inf", aims=n) for n in (1, 5))
    assert bool((all_.size <= one.size).all())
    untargeted = mohs.attack(FAB(steps=20), net, x, y, "l2:inf")
    assert float((untargeted.size / all_.size).median()) < 1.02


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**12])
def test_the_scale_of_the_logits_does_not_matter(scale: float) -> None:
    class Scaled(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return net(z) * scale

    net, x = relu_net((12,)), inputs(32, 12)
    y = net(x).argmax(1)
    plain, other = (mohs.attack(FAB(steps=20), m, x, y, "l2:inf") for m in (net, Scaled().eval()))
    torch.testing.assert_close(other.size, plain.size, rtol=1e-2, atol=1e-4)


def test_points_only_get_closer_with_more_steps() -> None:
    net, x = conv_net(), inputs(24, 1, 12, 12)
    y = net(x).argmax(1)
    sizes = [mohs.attack(FAB(steps=n), net, x, y, "linf:inf").size for n in (3, 6, 12, 24)]
    for fewer, more in itertools.pairwise(sizes):
        assert bool((more <= fewer).all())
    assert float((sizes[-1] / sizes[0]).median()) < 0.999


def fab_step(attack: FAB, x: Tensor, over: float, met: bool) -> tuple[Problem, FABState]:
    """The second step from ``x`` of a model of one plane: class 0 up to x[0] = 0.5, then class 1."""

    class Plane(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(z[:, 0]), z[:, 0] - 0.5], 1)

    job = Job(
        attack, Plane(), torch.tensor([[0.0, 0.2]], dtype=torch.float64), torch.tensor([0]), Threat.parse("l2:inf")
    )
    index = torch.zeros(1, dtype=torch.int64)
    problem = job.problem(index, index)
    state = attack.step(problem, attack.init(problem), 0)
    assert bool(x[0, 0] > 0.5) == met
    return problem, attack.step(problem, replace(state, x=x, over=torch.tensor([over], dtype=x.dtype)), 1)


@pytest.mark.parametrize("beta", [0.9, 0.5, 1.0])
@pytest.mark.parametrize("met", [False, True])
def test_a_step_is_its_equations(met: bool, beta: float) -> None:
    attack, over = FAB(beta=beta, alpha_max=0.3), 0.05
    x0 = torch.tensor([[0.0, 0.2]], dtype=torch.float64)
    x = torch.tensor([[0.7 if met else 0.4, 0.6]], dtype=torch.float64)
    _, state = fab_step(attack, x, over, met)
    base = x0 + beta * (x - x0) if met else x  # equation 10's backward step
    d, d0 = torch.zeros_like(x), torch.zeros_like(x)
    d[0, 0], d0[0, 0] = 0.5 - base[0, 0], 0.5
    near, far = d.norm(), d0.norm()
    a = min(float(near / (near + far)), 0.3)
    eta = 1 + over
    want = (1 - a) * (base + eta * d) + a * (x0 + eta * d0)
    torch.testing.assert_close(state.x, want, rtol=1e-6, atol=1e-9)


def test_the_overshoot_shrinks_where_it_is_all_that_is_left_and_comes_back() -> None:
    attack = FAB()
    near = torch.tensor([[0.51, 0.2]], dtype=torch.float64)  # 0.51 < 1.05 * 0.5
    far = torch.tensor([[0.6, 0.2]], dtype=torch.float64)
    below = torch.tensor([[0.49, 0.2]], dtype=torch.float64)
    overs = [float(fab_step(attack, x, 0.04, bool(x[0, 0] > 0.5))[1].over) for x in (near, far, below)]
    assert overs == pytest.approx([0.02, 0.04, 0.05])
    assert float(fab_step(attack, below, 0.01, False)[1].over) == pytest.approx(0.02)


def test_a_restart_begins_within_half_of_the_first_distance() -> None:
    net, x = Linear(12, 3, dtype=torch.float64), inputs(32, 12, dtype=torch.float64)
    y = net(x).argmax(1)
    index = torch.arange(32)
    problem = Job(FAB(), net, x, y, Threat.parse("l2:inf"), restarts=2).problem(index, torch.ones_like(index))
    state = FAB().step(problem, FAB().init(problem), 0)
    size = (state.x - x).norm(dim=1)
    exact = optimum(net, x, y, Threat.parse("l2:inf"))
    assert bool((size > 0).all())
    assert bool((size <= exact / 2 * 1.001).all())


def test_later_steps_visit_no_more_than_revisit_and_no_class_that_is_too_far() -> None:
    net, x = relu_net((12,), classes=9, hidden=32), inputs(32, 12)
    y = net(x).argmax(1)
    backwards = [int(mohs.attack(FAB(steps=12, revisit=r), net, x, y, "l2:inf").backwards.sum()) for r in (1, 3, 8)]
    assert backwards[0] < backwards[1] <= backwards[2] < 32 * (8 + 11 * 8)
    clean = mohs.attack(FAB(steps=12), net, x, (y + 1) % 9, "l2:inf")
    assert clean.forwards.tolist() == [1] * 32  # met at the clean input: nothing is smaller


def test_restarts_begin_elsewhere_and_keep_what_is_better() -> None:
    net, x = relu_net((12,), hidden=64), inputs(64, 12)
    y = net(x).argmax(1)
    one, four = (mohs.attack(FAB(steps=8), net, x, y, "l2:inf", restarts=r) for r in (1, 4))
    assert bool((four.size <= one.size).all())
    assert bool((four.size < one.size).any())


def test_it_starts_where_it_is_told() -> None:
    net, x = conv_net(), inputs(24, 1, 12, 12)
    y = net(x).argmax(1)
    first = mohs.attack(DeepFool(), net, x, y, "l2:inf")
    out = mohs.attack(FAB(steps=6), net, x, y, "l2:inf", start=first.x)
    assert bool((out.size <= first.size * 1.0001).all())
    assert float((out.size / first.size).median()) < 0.99


def test_confidence_moves_the_rivals() -> None:
    net, x = Linear(12, 3), inputs(32, 12)
    y = net(x).argmax(1)
    out = mohs.attack(FAB(steps=30), net, x, y, "l2:inf in [-inf, inf]", confidence=1.0)
    assert out.success.all()
    z = net(out.x).detach()
    lead = z.scatter(1, y.unsqueeze(1), -math.inf).amax(1) - z.gather(1, y.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(lead, torch.ones(32), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"alpha_max": 1.5}, {"beta": -0.1}, {"eta": 0.9}, {"revisit": 0}], ids=str
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        FAB(**bad)
