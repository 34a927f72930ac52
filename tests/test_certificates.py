"""Certificates against truth: exact answers where they can be computed, and never a claim that a point contradicts."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from certificate_nets import answers, conv_net, least_margin_by_milp, margin, points, random_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mohs
from mohs.certificates import CROWN, IBP, certify
from mohs.certificates import _bounds as bounds
from mohs.certificates._layers import Arithmetic
from mohs.certificates._net import read_net
from mohs.regions import L1, L2, Linf, Lp
from mohs.threat import Threat

BOTH = (IBP(), CROWN())
TOLERANCE = 1e-4  # relative: the certificates cover the 1e-5 that a region tolerates, and float32


# ---- exact answers


@pytest.mark.parametrize("certificate", BOTH, ids=str)
def test_hand_computed_bounds(certificate: IBP | CROWN) -> None:
    # hidden: a = relu(x1 + x2 - 1), b = relu(x1 - x2); margin = a - b + 1; box wide enough not to matter
    net = random_net(2, 2, 2)
    net[0].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    net[0].bias.data = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    net[2].weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    net[2].bias.data = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x, y = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([0])
    proof = certify(certificate, net, x, y, Threat(Linf(0.25), box=(-10, 10)))
    # both hidden inputs lie in [-1/2, 1/2]: intervals give 0 - 1/2 + 1. CROWN: a >= 0 (equal ends take the line 0),
    # b <= (x1 - x2) / 2 + 1/4, so the margin is at least 1 - 1/4 - (1/2)(1/2) = 1/2 as well
    assert proof.margin_bound.item() == pytest.approx(0.5, abs=1e-4)
    assert proof.margin_bound.item() <= 0.5
    assert proof.holds.item()


def test_crown_keeps_a_cancellation_that_intervals_lose() -> None:
    # a stable pair whose difference is x1 + 5 - (x1 + 4) = 1 whatever the input: exact for CROWN, not for IBP
    net = random_net(1, 2, 2)
    net[0].weight.data, net[0].bias.data = torch.ones(2, 1).double(), torch.tensor([5.0, 4.0]).double()
    net[2].weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]]).double()
    net[2].bias.data = torch.zeros(2).double()
    x, y = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    threat = Threat(Linf(2.0), box=(-9, 9))
    assert certify(CROWN(), net, x, y, threat).margin_bound.item() == pytest.approx(1.0, abs=1e-4)
    assert certify(IBP(), net, x, y, threat).margin_bound.item() == pytest.approx(-3.0, abs=1e-4)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 1.0), (-1.0, 3.0), (-2.0, 2.0), (1.0, 2.0), (-2.0, -1.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_lines_of_one_relu(low: float, high: float, sign: float) -> None:
    # margin = sign * relu(x) + 10 - x / 4, and what its linear bounds give at the ends of [low, high]
    net = random_net(1, 3, 2)
    net[0].weight.data = torch.tensor([[1.0], [1.0], [0.0]]).double()
    net[0].bias.data = torch.tensor([0.0, 50.0, 60.0]).double()  # the second is stable: x + 50; the third a constant
    net[2].weight.data = torch.tensor([[sign, -0.25, 12.5 / 60], [0.0, 0.0, 0.0]]).double()
    net[2].bias.data = torch.tensor([10.0, 0.0]).double()
    x = torch.tensor([[(low + high) / 2]], dtype=torch.float64)
    proof = certify(CROWN(), net, x, torch.tensor([0]), Threat(Linf((high - low) / 2), box=(-9, 9)))
    if low >= 0 or high <= 0:
        lines = [sign * max(end, 0) - end / 4 for end in (low, high)]
    elif sign > 0:
        below = 1.0 if high > -low else 0.0
        lines = [below * end - end / 4 for end in (low, high)]
    else:
        lines = [-high / (high - low) * (end - low) - end / 4 for end in (low, high)]
    intervals = sign * (max(high, 0) if sign < 0 else max(low, 0)) - high / 4
    assert proof.margin_bound.item() == pytest.approx(10 + max(min(lines), intervals), abs=1e-3)


def test_the_line_below_leaves_the_smaller_area() -> None:
    low, high = torch.tensor([[-3.0, -1.0, -2.0, 1.0, -2.0]]), torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0]])
    passage = bounds.Passage(bounds.Ball(low, high, Arithmetic(torch.float32, torch.float32)))
    bounds._draw_lines(passage, 0, low, high)
    assert passage.below[0].tolist() == [[0.0, 1.0, 0.0, 1.0, 0.0]]
    assert passage.above[0].tolist() == [[0.25, 0.75, 0.5, 1.0, 0.0]]


@pytest.mark.parametrize("certificate", BOTH, ids=str)
@pytest.mark.parametrize("region", [Linf(0.05), L2(0.1), L1(0.15), Lp(3.0, 0.1)], ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_linear_nets_are_exact(certificate: IBP | CROWN, region: Lp, dtype: torch.dtype, scaled: bool) -> None:
    net = random_net(6, 4, dtype=dtype)
    model = mohs.models.normalized(net, mean=[0.2, 0.5, 0.1, 0, 0, 0], std=[0.5, 2, 1, 1, 3, 0.7]) if scaled else net
    model = model.to(dtype)
    net[0].bias.data = -0.5 * net[0].weight.data.sum(1)  # a tie near the centre
    net[0].bias.data += model(torch.full((1, 6), 0.5, dtype=dtype)).detach()[0].neg()
    x = torch.rand(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (0.3 + 0.4 * x).to(dtype)  # the ball stays inside the box
    y = answers(model, x)
    double = copy.deepcopy(model).double()
    w = torch.func.jacrev(lambda v: double(v.unsqueeze(0))[0])(x[0].double()).detach()
    z = double(x.double()).detach()
    own = y.unsqueeze(1)
    gaps = z.gather(1, own) - z
    cost = region.eps * region.dual((w[y].unsqueeze(1) - w).flatten(0, 1)).view(len(x), -1)
    exact = (gaps - cost).scatter(1, own, math.inf).amin(1)
    proof = certify(certificate, model, x, y, Threat(region))
    assert (proof.margin_bound <= exact).all()
    torch.testing.assert_close(proof.margin_bound, exact, atol=TOLERANCE, rtol=TOLERANCE)
    clear = exact.abs() > 1e-3
    assert clear.sum() > 20
    assert 0 < (exact > 0).sum() < len(x)  # both verdicts occur
    assert torch.equal(proof.holds[clear], (exact > 0)[clear])


@pytest.mark.parametrize("region", [Linf(0.1), L2(0.3), L1(0.5), Lp(3.0, 0.2)], ids=lambda r: r.name)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_intervals_of_the_first_layer_are_exact(region: Lp, kind: str) -> None:
    # one unit that is always active, behind a normalisation; margin = unit
    generator = torch.Generator().manual_seed(14)
    if kind == "linear":
        first: nn.Module = nn.Linear(4, 1, dtype=torch.float64)
        x = torch.full((1, 4), 0.5, dtype=torch.float64)
        mean, std = [0.1, 0.2, 0.3, 0.4], [0.2, 1.0, 2.0, 4.0]
    else:
        first = nn.Conv2d(2, 1, 2, dtype=torch.float64)
        x = torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64)
        mean, std = [0.1, 0.2], [0.2, 3.0]
    first.weight.data = torch.randn(first.weight.shape, generator=generator, dtype=torch.float64)
    first.bias.data = torch.tensor([50.0]).double()
    last = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    last.weight.data = torch.ones(1, 1).double()
    model = mohs.models.normalized(nn.Sequential(first, nn.Flatten(), nn.ReLU(), last), mean, std).double().eval()
    w = torch.func.jacrev(lambda v: model(v.unsqueeze(0))[0])(x[0]).detach()
    exact = model(x).item() - region.eps * region.dual(w).item()
    found = certify(IBP(), model, x, torch.tensor([1]), Threat(region, box=(-9, 9))).margin_bound.item()
    assert found <= exact
    assert found == pytest.approx(exact, abs=1e-3)


def test_the_box_tightens_every_norm() -> None:
    net = random_net(4, 2)
    net[0].weight.data = torch.tensor([[0.0, 0, 0, 0], [1.0, 1, 1, 1]]).double()
    net[0].bias.data = torch.tensor([0.5, 0.0]).double()
    x, y = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0])
    for region in (Linf(0.2), L2(0.4), L1(0.8)):
        # adversary raises sum(x); the box [0, 0.1] allows 0.4 of it
        tight = certify(CROWN(), net, x, y, Threat(region, box=(0.0, 0.1))).margin_bound.item()
        wide = certify(CROWN(), net, x, y, Threat(region, box=(-1.0, 1.0))).margin_bound.item()
        assert tight == pytest.approx(0.1, abs=1e-4)
        assert wide == pytest.approx(-0.3, abs=1e-4)


@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.02, 0.1, 0.3, 1.0]))
@settings(max_examples=12, deadline=None)
def test_never_above_the_exact_least_margin(seed: int, eps: float) -> None:
    net = random_net(3, 5, 4, 3, seed=seed)
    x = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = answers(net, x)
    threat = Threat(Linf(eps))
    interval, crown = (certify(c, net, x, y, threat).margin_bound for c in BOTH)
    for i in range(len(x)):
        exact = least_margin_by_milp(net, x[i], int(y[i]), eps, threat.box)
        assert crown[i] <= exact + 1e-7
        assert interval[i] <= exact + 1e-7
    assert (crown >= interval - 1e-9).all()


def test_crown_is_close_to_exact_on_small_balls() -> None:
    net = random_net(3, 8, 8, 3, seed=2)
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = answers(net, x)
    crown = certify(CROWN(), net, x, y, "linf:0.01").margin_bound
    exact = torch.tensor([least_margin_by_milp(net, x[i], int(y[i]), 0.01, (0, 1)) for i in range(6)])
    assert (exact - crown).max() < 0.01
    gap = certify(IBP(), net, x, y, "linf:0.01").margin_bound
    assert (exact - gap).max() > (exact - crown).max()


def test_intermediate_bounds_contain_every_corner() -> None:
    net = random_net(4, 6, 6, 6, 2, seed=5)
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    eps = 0.15
    read = read_net(net, x, torch.float64)
    corners = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=4)), dtype=torch.float64)
    ball = bounds.Ball.around(x, Linf(eps), (0, 1), read.arithmetic)
    inside = (x.unsqueeze(1) + eps * corners).clamp(0, 1)
    functions = torch.randn(30, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for specs in (None, 7):
        passage = bounds.enclose(read, ball, specs)
        assert passage.hull is not None
        with torch.no_grad():
            hidden = net[:-1](inside)
        assert (hidden >= passage.hull.lower.unsqueeze(1)).all()
        assert (hidden <= passage.hull.upper.unsqueeze(1)).all()
        for row in range(3):
            found = bounds.backwards(read, passage, functions, torch.full((30,), row), len(net) - 1)
            assert (found.unsqueeze(1) <= functions @ hidden[row].T).all()
        for i, layer in enumerate(net):
            if isinstance(layer, nn.ReLU):
                with torch.no_grad():
                    z = net[:i](inside)
                top = passage.above[i].unsqueeze(1) * z + passage.offset[i].unsqueeze(1)
                assert (z.relu() <= top).all()
                assert (z.relu() >= passage.below[i].unsqueeze(1) * z).all()


def test_bounds_before_a_relu_are_exact_behind_affine_layers() -> None:
    first, second = random_net(3, 4, seed=1)[0], random_net(4, 6, seed=2)[0]
    net = nn.Sequential(first, second, nn.ReLU(), nn.Linear(6, 2, dtype=torch.float64))
    x = torch.full((1, 3), 0.5, dtype=torch.float64)
    second.bias.data -= net[:2](x)[0].detach() + torch.tensor([0.3, -0.3, 0.1, -0.1, 0.2, -0.2])  # all six cross zero
    read = read_net(net, x, torch.float64)
    passage = bounds.enclose(read, bounds.Ball.around(x, Linf(0.4), (0, 1), read.arithmetic), 4)
    corners = x + 0.4 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    z = net[:2](corners).detach()
    low, high = z.amin(0), z.amax(0)
    assert ((low < 0) & (high > 0)).sum() >= 5
    assert passage.hull is not None
    assert (passage.hull.upper[0] >= high.relu()).all()
    torch.testing.assert_close(passage.hull.upper[0], high.relu(), atol=1e-4, rtol=0)
    crossing = (low < 0) & (high > 0)
    slopes = (high / (high - low))[crossing]
    torch.testing.assert_close(passage.above[2][0][crossing], slopes, atol=1e-4, rtol=0)
    assert (passage.offset[2][0] >= -passage.above[2][0] * low - 1e-12)[crossing].all()


# ---- soundness by points, on every layer and norm


@pytest.mark.parametrize("region", [Linf(0.03), L2(0.2), L1(0.5), Lp(1.5, 0.3)], ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_point_contradicts(region: Lp, dtype: torch.dtype) -> None:
    net = mohs.models.normalized(conv_net(), mean=(0.4, 0.5), std=(0.3, 0.2))
    x = torch.rand(5, 2, 9, 8, generator=torch.Generator().manual_seed(7))
    y = answers(net, x)
    proofs = [certify(replace(c, dtype=dtype), net, x, y, Threat(region), batch=3) for c in BOTH]
    executed = torch.stack([margin(net, p, y) for p in points(region, x, (0.0, 1.0), 60)]).amin(0)
    for proof in proofs:
        assert (proof.margin_bound <= executed).all()
        assert proof.margin_bound.isfinite().all()
    assert (proofs[1].margin_bound >= proofs[0].margin_bound - 1e-6).all()


@given(
    scale=st.sampled_from([1e-30, 1e-12, 1e-3, 1.0, 1e4, 1e15, 1e25, 1e37]),
    input_scale=st.sampled_from([1e-38, 1e-20, 1.0, 1e8, 1e20]),
    seed=st.integers(0, 1000),
    certificate=st.sampled_from([*BOTH, IBP(dtype=torch.float32), CROWN(dtype=torch.float32)]),
)
@settings(max_examples=60, deadline=None)
def test_sound_at_any_scale(scale: float, input_scale: float, seed: int, certificate: IBP | CROWN) -> None:
    # weights and inputs over the whole float32 range, where products overflow and vanish
    net = random_net(5, 7, 6, 3, seed=seed, dtype=torch.float32)
    net[0].weight.data *= scale
    net[2].weight.data *= 1 / scale if seed % 2 else 1.0
    x = input_scale * torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
    y = answers(net, x)
    region = Linf(0.05 * input_scale)
    box = (0.0, input_scale)
    proof = certify(certificate, net, x, y, Threat(region, box=box))
    for p in points(region, x, box, 30, seed):
        executed = margin(net, p, y)
        assert not (executed[proof.holds] <= 0).any()
        assert not (executed < proof.margin_bound).any()


def test_rounding_of_the_executed_net_is_inside_the_bound() -> None:
    # real margin 1e-6 > 0 at a point where float32 sums of 1e4-sized terms lose it
    net = nn.Sequential(nn.Linear(200, 2)).eval()
    generator = torch.Generator().manual_seed(11)
    w = 1e3 * torch.randn(100, generator=generator)
    net[0].weight.data = torch.stack([torch.cat([w, -w]), torch.zeros(200)])
    net[0].bias.data = torch.tensor([1e-6, 0.0])
    half = torch.rand(20, 100, generator=generator)
    x = torch.cat([half, half], 1)  # the terms cancel in real arithmetic
    exact = margin(net.double(), x.double(), torch.zeros(20, dtype=torch.int64))
    assert (exact > 0).all()
    net.float()
    assert (margin(net, x, torch.zeros(20, dtype=torch.int64)) < 0).any()
    for certificate in BOTH:
        assert not certify(certificate, net, x, torch.zeros(20, dtype=torch.int64), "linf:0").holds.any()


def test_overflow_on_the_way_is_no_proof() -> None:
    # margin 10 - relu(3x1 + 3x2 - 3x3 - 2.9x4) in units of 1e38: at least 4 in real numbers, but the sum passes 3.4
    net = random_net(4, 1, 1, dtype=torch.float32)
    net[0].weight.data, net[0].bias.data = torch.tensor([[3e38, 3e38, -3e38, -2.9e38]]), torch.zeros(1)
    net[2].weight.data, net[2].bias.data = torch.tensor([[-1e-38]]), torch.tensor([10.0])
    x, y = torch.full((1, 4), 0.5), torch.tensor([1])
    assert margin(net, x, y) > 0
    assert margin(net, torch.tensor([[1.0, 1.0, 0.0, 0.0]]), y) < 0
    for certificate in BOTH:
        assert not certify(certificate, net, x, y, "linf:0.5").holds.item()


def test_underflow_on_the_way_is_no_proof() -> None:
    # margin 1e-28 x: positive for every x of the box in real numbers, a tie in float32 at its lower end
    net = nn.Sequential(nn.Linear(1, 2)).eval()
    net[0].weight.data, net[0].bias.data = torch.tensor([[1e-28], [0.0]]), torch.zeros(2)
    y, box = torch.tensor([0]), (1e-18, 2e-17)
    assert margin(net, torch.tensor([[1.8e-17]]), y) > 0
    assert margin(net, torch.tensor([[1e-18]]), y) == 0
    for certificate in BOTH:
        assert not certify(certificate, net, torch.tensor([[1.8e-17]]), y, Threat(Linf(1e-3), box=box)).holds.item()


@pytest.mark.parametrize("region", [Linf(0.1), L2(0.3), L1(0.5), Lp(3.0, 0.2)], ids=lambda r: r.name)
def test_whatever_a_region_accepts_lies_in_the_ball(region: Lp) -> None:
    x0 = torch.rand(50, 30, generator=torch.Generator().manual_seed(12))
    ball = bounds.Ball.around(x0, region, (0.0, 1.0), Arithmetic(torch.float32, torch.float64))
    eps = torch.full((50,), region.eps)
    generator = torch.Generator().manual_seed(13)
    accepted = 0
    for stretch in (1.0, 1 + 5e-6, 1 + 9e-6, 1 + 1.1e-5):
        direction = region.steepest(torch.randn(x0.shape, generator=generator))
        x = x0 + region.eps * stretch * direction
        rows = region.contains(x, x0, eps) & (x >= 0).all(1) & (x <= 1).all(1)
        accepted += int(rows.sum())
        far = x.double()[rows]
        assert (far >= ball.lower[rows]).all()
        assert (far <= ball.upper[rows]).all()
        if ball.radius is not None:
            size = torch.linalg.vector_norm(far - x0.double()[rows], region.p, dim=1)
            assert (size <= ball.radius[rows]).all()
    assert accepted > 0


def test_attacks_never_break_a_certified_row() -> None:
    net = random_net(8, 16, 16, 4, seed=3, dtype=torch.float32)
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(4))
    y = answers(net, x)
    for text in ("linf:0.06", "l2:0.12"):
        proof = mohs.certify(mohs.certificates.CROWN(), net, x, y, text)
        broken = mohs.attack(mohs.attacks.PGD(steps=30), net, x, y, text, restarts=2, seed=0).success
        assert proof.holds.any()
        assert broken.any()
        assert not (proof.holds & broken).any()
