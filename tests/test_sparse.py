"""Sparse attacks against exact counts: linear models in a box, the best pair by enumeration, channels, targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from core_models import Linear, conv_net, inputs, relu_net, seeded
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs.attacks import JSMA, SPGD, SigmaZero, SparseFool
from mohs.attacks.jsma import _best_pair
from mohs.errors import ThreatError, UsageError

SPARSE = [SigmaZero(steps=160), JSMA()]
each_sparse = pytest.mark.parametrize("attack", SPARSE, ids=lambda a: type(a).__name__)


def fewest(model: Linear, x: Tensor, goals: list[list[tuple[int, int]]], high: float = 1.0) -> Tensor:
    """Smallest count of features: for each row the least over its (raised, lowered) pairs, features in order of gain."""
    w, z = model.weight.detach().double(), model(x).detach().double()
    counts = []
    for i, pairs in enumerate(goals):
        best = math.inf
        for up, down in pairs:
            d = w[:, up] - w[:, down]
            room = torch.where(d > 0, high - x[i].double(), x[i].double())
            gains = (d.abs() * room).sort(descending=True).values.cumsum(0)
            gap = z[i, down] - z[i, up]
            if gap < gains[-1] - 1e-5:
                best = min(best, 1 + int((gains <= gap).sum()) if gap > 0 else 0)
        counts.append(best)
    return torch.tensor(counts)


# --- exact on linear models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [1.0, 255.0])
@pytest.mark.parametrize("classes", [2, 4])
@each_sparse
def test_the_fewest_features_of_linear_models(attack: object, classes: int, high: float) -> None:
    model, x = Linear(30, classes, seed=1), inputs(24, 30) * high
    y = model(x).argmax(1)
    out = mohs.attack(attack, model, x, y, f"l0:inf in [0, {high}]")
    exact = fewest(model, x, [[(k, int(c)) for k in range(classes) if k != c] for c in y], high)
    assert bool((out.size >= exact).all())
    assert out.success.eq(exact.isfinite()).all()
    assert (out.size == exact).float().mean() > 0.9
    assert bool((out.size <= exact + 1).all())


@each_sparse
def test_targets_are_reached(attack: object) -> None:
    # one library's sigma-zero climbs away from the target, and reaches none
    net, x = relu_net((20,)), inputs(40, 20)
    targets = (net(x).argmax(1) + 1) % 4
    out = mohs.attack(attack, net, x, net(x).argmax(1), "l0:inf", targets=targets)
    assert out.success.float().mean() > 0.9
    assert bool((net(out.x).argmax(1) == targets)[out.success].all())
    small = Linear(20, 2, seed=3)
    y = small(x).argmax(1)
    reached = mohs.attack(attack, small, x, y, "l0:inf", targets=1 - y)
    assert torch.equal(reached.size, mohs.attack(attack, small, x, y, "l0:inf").size)


@each_sparse
def test_small_nets_by_enumeration(attack: object) -> None:
    net, x = relu_net((6,), classes=3), inputs(30, 6)
    y = net(x).argmax(1)
    out = mohs.attack(attack, net, x, y, "l0:inf")
    corners = torch.tensor(list(itertools.product([0.0, 1.0, -1.0], repeat=6)))  # -1: as it is
    best = torch.full((30,), math.inf)
    for corner in corners:
        moved = torch.where(corner >= 0, corner, x)
        met = net(moved).argmax(1) != y
        best = torch.where(met, torch.minimum(best, (moved != x).sum(1).float()), best)
    assert (out.size <= best).float().mean() > 0.8
    assert bool((out.size <= best + 1).all())


# --- scales, channels, settings ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, net: nn.Module, unit: float) -> None:
        super().__init__()
        self.net, self.unit = net, unit

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.unit


@pytest.mark.parametrize("unit", [2.0**-80, 2.0**20])
@each_sparse
def test_the_scale_of_the_logits_does_not_matter(attack: object, unit: float) -> None:
    net, x = relu_net((12,)), inputs(30, 12)
    y = net(x).argmax(1)
    plain, scaled = (mohs.attack(attack, n, x, y, "l0:inf") for n in (net, Scaled(net, unit)))
    assert torch.equal(plain.size, scaled.size)


@each_sparse
def test_a_pixel_counts_once_whatever_its_channels(attack: object) -> None:
    net = nn.Sequential(nn.Flatten(), relu_net((75,), hidden=24))
    x = inputs(30, 3, 5, 5)
    y = net(x).argmax(1)
    pixels, features = (mohs.attack(attack, net, x, y, f"{t}:inf") for t in ("l0", "l0-features"))
    assert torch.equal(pixels.size, (pixels.x != x).any(1).flatten(1).sum(1).float())
    assert torch.equal(features.size, (features.x != x).flatten(1).sum(1).float())
    assert bool(pixels.success.all())
    assert pixels.size.sum() < features.size.sum()


@each_sparse
def test_the_polish_never_loses(attack: object) -> None:
    net, x = conv_net(), inputs(16, 1, 12, 12)
    y = net(x).argmax(1)
    kind = type(attack)
    plain, polished = (mohs.attack(kind(steps=s, polish=p), net, x, y, "l0:inf") for s, p in ((60, 0), (120, 60)))
    if kind is not SigmaZero:  # its schedule follows the number of steps
        assert bool((polished.size <= plain.size).all())
    assert polished.size.mean() < plain.size.mean()


def test_a_row_ends_where_one_position_suffices() -> None:
    model, x = relu_net((12,)), inputs(20, 12)
    out = mohs.attack(SigmaZero(steps=200), model, x, model(x).argmax(1), "l0:inf")
    assert bool((out.forwards[out.size == 1] < 200).all())
    assert bool((out.size == 1).any())


def test_what_is_refused() -> None:
    net, x = relu_net((6,)), inputs(3, 6)
    y = net(x).argmax(1)
    for attack in SPARSE:
        with pytest.raises(ThreatError, match="finite"):
            mohs.attack(attack, net, x, y, "l0:inf in [-inf, inf]")
        with pytest.raises(ThreatError, match="l0"):
            mohs.attack(attack, net, x, y, "l2:inf")
    for wrong in ({"steps": 0}, {"polish": -1}, {"step_size": 2.0}, {"smoothing": 0.0}, {"pace": "a"}):
        with pytest.raises(UsageError):
            SigmaZero(**wrong)
    with pytest.raises(UsageError, match="neither"):
        JSMA(increase=False, decrease=False)


# --- sigma-zero -------------------------------------------------------------------------------------------------------


def sigma_zero_to_the_letter(net: nn.Module, x0: Tensor, y: int, steps: int) -> Tensor:
    """Algorithm 1 for one row [channels, H, W] in the unit box, as printed; the margin at every look."""
    d, first, second, t, values = torch.zeros_like(x0), torch.zeros_like(x0), torch.zeros_like(x0), 0.3, []
    for k in range(steps + 1):
        v = d.clone().requires_grad_(True)
        z = net((x0 + v).unsqueeze(0))[0]
        margin = torch.cat([z[:y], z[y + 1 :]]).max() - z[y]
        (up,) = torch.autograd.grad(margin, v)
        values.append(float(margin.detach()))
        c = v.square().sum(0)
        (g,) = torch.autograd.grad((c / (c + 1e-3)).mean(), v)
        if values[-1] <= 0:
            g = g - up / up.abs().max()
        g = g / g.abs().max()
        rate, pace = (0.1 + 0.45 * (1 + math.cos(math.pi * i / steps)) for i in (max(k - 1, 0), k))
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        d = d - rate * first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        d = (x0 + d).clamp(0, 1) - x0
        t = min(max(t + 0.01 * pace * (1 if values[-1] > 0 else -1), 0), 1)
        d = torch.where((d.abs() >= t).any(0), d, 0.0)
    return torch.tensor(values)


def far_from_the_boundary() -> nn.Module:
    """A net of 3 x 5 x 5 inputs that answers class 0 until several positions are changed."""
    net = nn.Sequential(nn.Flatten(), relu_net((75,), hidden=24)).double()
    with torch.no_grad():
        net[1][-1].bias[0] += 1.5
    return net


def test_sigma_zero_is_its_algorithm_box() -> None:
    net, x = far_from_the_boundary(), inputs(4, 3, 5, 5, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.int64)
    out = mohs.attack(SigmaZero(steps=40, polish=0), net, x, y, "l0:inf", trace=True)
    for i in (out.size > 1).nonzero().flatten().tolist():
        want = sigma_zero_to_the_letter(net, x[i], int(y[i]), 40)
        torch.testing.assert_close(out.trace[i, 0, :40].double(), want[:40].double(), rtol=1e-5, atol=1e-7)
    assert int((out.size > 1).sum()) > 1


def test_the_polish_begins_at_the_best_point() -> None:
    net, x = far_from_the_boundary(), inputs(12, 3, 5, 5, dtype=torch.float64)
    y = torch.zeros(12, dtype=torch.int64)
    out = mohs.attack(SigmaZero(steps=140, polish=10), net, x, y, "l0:inf", trace=True)
    looks = out.trace[out.size > 1, 0]
    assert len(looks) > 3
    # a row leaves the descent by going back: some late look is one of the earlier ones over again
    again = [(looks[:, :at] - looks[:, at : at + 1]).abs().amin(1) < 1e-9 for at in range(131, 140)]
    assert bool(torch.stack(again).any(0).float().mean() > 0.7)


# --- JSMA -------------------------------------------------------------------------------------------------------------


def test_the_best_pair_is_the_one_of_all_pairs() -> None:
    g = seeded(5)
    for correlation in (-0.7, 0.0, 0.7):
        gain = torch.randn(60, 40, generator=g, dtype=torch.float64)
        fall = correlation * gain + torch.randn(60, 40, generator=g, dtype=torch.float64)
        gain[:, ::3] = -math.inf  # not free to move
        fall[:, ::3] = -math.inf
        gains, falls = (v.unsqueeze(1) + v.unsqueeze(2) for v in (gain, fall))
        table = torch.where((gains > 0) & (falls > 0), gains * falls, 0.0)
        table.diagonal(dim1=1, dim2=2).zero_()
        value, pair = _best_pair(gain, fall)
        torch.testing.assert_close(value.squeeze(1), table.flatten(1).amax(1))
        torch.testing.assert_close(table[torch.arange(60), pair[:, 0], pair[:, 1]], value.squeeze(1))


@pytest.mark.parametrize("up", [True, False])
def test_features_move_one_way_and_two_per_step(up: bool) -> None:
    net, x = relu_net((20,)), inputs(40, 20)
    y = net(x).argmax(1)
    only = {"increase": up, "decrease": not up, "polish": 0}
    out = mohs.attack(JSMA(all_rivals=True, **only), net, x, y, "l0:inf", targets=(y + 1) % 4)
    change = (out.x - x)[out.success]
    assert bool(((change >= 0) if up else (change <= 0)).all())
    assert bool((out.size[out.success] % 2 == 0).all())
    assert 0 < int(out.success.sum()) < 40  # where no pair is salient, the row ends and moves nothing


def test_small_steps_return_to_a_feature() -> None:
    model, x = Linear(10, 2, seed=4), 0.1 + 0.8 * inputs(20, 10)
    y = model(x).argmax(1)
    out = mohs.attack(JSMA(step_size=0.05, pairs=False, polish=0), model, x, y, "l0:inf")
    far = (out.x - x).abs().amax(1)[out.success]
    assert bool((far > 0.051).any())
    assert bool(out.success.any())
    assert bool((out.forwards[out.success] > out.size[out.success]).any())


class Hill(nn.Module):
    """Best at 0.5, where it still falls short."""

    def forward(self, x: Tensor) -> Tensor:
        height = -((x[:, 0] - 0.5) ** 2) - 0.01
        return torch.stack([torch.zeros_like(height), height], 1)


@pytest.mark.parametrize("start", [0.3, 0.7])
def test_a_feature_once_moved_keeps_its_direction(start: float) -> None:
    x = torch.tensor([[start, 0.5]])
    out = mohs.attack(JSMA(step_size=0.4, pairs=False), Hill(), x, torch.tensor([0]), "l0:inf")
    assert (int(out.forwards), int(out.backwards)) == (2, 2)  # across the hill; there is no way back


class Three(nn.Module):
    """Logits x W of three classes, beside a bias."""

    def __init__(self, weight: list[list[float]], bias: list[float]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("pairs", [False, True])
def test_a_change_that_lifts_the_rival_too_is_not_salient(pairs: bool) -> None:
    # all changes raise class 1, but class 0 by more
    model, x = Three([[2.0, 1.0, 0.0], [3.0, 1.0, 0.0]], [0.5, 0.0, -9.0]), torch.full((1, 2), 0.5)
    out = mohs.attack(
        JSMA(pairs=pairs, decrease=False), model, x, torch.tensor([0]), "l0:inf", targets=torch.tensor([1])
    )
    assert (int(out.forwards), int(out.backwards)) == (1, 2)


@pytest.mark.parametrize("all_rivals", [False, True])
def test_rivals_are_the_strongest_or_all_of_them(all_rivals: bool) -> None:
    # the first feature lifts a third class that is far below, by more than it lowers the strongest
    model, x = Three([[-1.0, 1.0, 5.0], [-0.5, 0.5, -1.0]], [0.05, 0.0, -99.0]), torch.full((1, 2), 0.01)
    attack = JSMA(pairs=False, decrease=False, all_rivals=all_rivals, polish=0)
    out = mohs.attack(attack, model, x, torch.tensor([0]), "l0:inf")
    assert out.success.all()
    assert (out.x != x)[0].tolist() == [not all_rivals, all_rivals]


@pytest.mark.parametrize("kind", [JSMA, SparseFool])
def test_the_polish_has_as_many_looks_as_it_is_given(kind: type) -> None:
    model, x = Linear(30, 2, seed=1), 0.3 + 0.4 * inputs(24, 30)
    y = model(x).argmax(1)
    plain, five = (mohs.attack(kind(polish=p), model, x, y, "l0:inf") for p in (0, 5))
    several = five.size > 1
    assert bool(several.any())
    assert torch.equal(five.forwards[several], plain.forwards[several] + 5)


def test_the_region_itself_is_exact_without_sorting_everything() -> None:
    score = torch.tensor([[3.0, 1.0, 3.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    x0, x = torch.zeros(2, 5), torch.ones(2, 5)
    region = Threat.parse("l0:3").region
    kept = region._keep(x, x0, score, torch.tensor([3.0, 2.0]))
    assert kept.tolist() == [[1, 0, 1, 1, 0], [1, 1, 0, 0, 0]]  # ties go to the first
    assert not region._keep(x, x0, score, torch.tensor([0.0, 0.0])).any()
    assert region._keep(x, x0, score, torch.tensor([math.inf, 9.0])).all()


# --- SparseFool and SPGD ----------------------------------------------------------------------------------------------


def test_sparsefool_crosses_every_linear_boundary_and_its_plane_is_controlled() -> None:
    model, x = Linear(30, 2, seed=1), inputs(24, 30)
    y = model(x).argmax(1)
    near, far = (mohs.attack(SparseFool(control=c, polish=0), model, x, y, "l0:inf") for c in (1.0, 3.0))
    exact = fewest(model, x, [[(1 - int(c), int(c))] for c in y])
    assert bool(near.success.all())
    assert bool(far.success.all())
    assert near.size.mean() < far.size.mean()
    polished = mohs.attack(SparseFool(), model, x, y, "l0:inf")
    assert (polished.size == exact).float().mean() > 0.9


@pytest.mark.parametrize("confidence", [0.0, 0.05])
@pytest.mark.parametrize("overshoot", [0.02, 0.2])
def test_sparsefool_is_its_algorithm_box(overshoot: float, confidence: float) -> None:
    # one rival and a short way: DeepFool goes beyond the boundary by the overshoot, the solver by control and overshoot
    model, x = Linear(30, 2, seed=1, dtype=torch.float64), 0.5 + 0.001 * inputs(16, 30, dtype=torch.float64)
    x[:, ::3] = torch.arange(10) % 2.0  # at a bound: the box lets about half of them go
    with torch.no_grad():
        model.bias[0] += model(x).diff(dim=1).amax() + 0.05
    y = model(x).argmax(1)
    assert not y.any()
    attack = SparseFool(overshoot=overshoot, polish=0)
    out = mohs.attack(attack, model, x, y, "l0:inf", trace=True, confidence=confidence)
    value, more = out.trace[:, 0], 1 + overshoot
    gap = confidence - value[:, 0]
    short = gap < 0.3  # else a coordinate reaches the bound
    assert int(short.sum()) > 3
    torch.testing.assert_close(value[short, 1], (gap * overshoot + confidence)[short], rtol=1e-6, atol=1e-9)
    w = (model.weight[:, 1] - model.weight[:, 0]).detach()
    plane = 3.0 * more * gap
    if overshoot < 0.1:
        shortest = mohs.L1(math.inf).shortest(w.expand_as(x), plane, x, (0.0, 1.0))
        there = (x + more * shortest).clamp(0, 1)
        torch.testing.assert_close(
            value[short, 2], model(there).diff(dim=1).squeeze(1).detach()[short], rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("projected", [False, True])
def test_spgd_stays_within_its_positions_and_finds_what_linear_models_allow(projected: bool) -> None:
    model, x = Linear(12, 2, seed=1), inputs(40, 12)
    y = model(x).argmax(1)
    exact = fewest(model, x, [[(1 - int(c), int(c))] for c in y])
    for eps in (1, 2, 3):
        out = mohs.attack(SPGD(steps=60, projected=projected), model, x, y, f"l0:{eps}", stop=mohs.Stop.BUDGET)
        assert bool(((out.x != x).sum(1) <= eps).all())
        assert not bool((out.success & (exact > eps)).any())
        can = exact <= eps
        assert out.success[can].float().mean() > 0.8 or not can.any()


def test_spgd_begins_where_it_is_told() -> None:
    model, x = Linear(12, 2, seed=1), inputs(8, 12)
    start = x.clone()
    start[:, 4] = 1 - start[:, 4].round()
    attack, y = SPGD(steps=1), model(x).argmax(1)
    out = mohs.attack(attack, model, x, y, "l0:1", start=start, trace=True)
    first = nn.functional.cross_entropy(model(start), y, reduction="none")
    torch.testing.assert_close(out.trace[:, 0, 0], first.detach())
