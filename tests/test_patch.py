"""Patches against truth: every window by enumeration, closed forms on linear models, places found by trial of all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from core_models import Linear, inputs, relu_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs import L0, Patch, Stop, Threat
from mohs.attacks import BIM, FGSM, PGD, LaVAN
from mohs.attacks.lavan import apart
from mohs.errors import ThreatError, UsageError
from mohs.objectives import margin

UNIT = (0.0, 1.0)
PLACES = [None, (0, 0), (1, 3), (4, 2)]
each_place = pytest.mark.parametrize("at", PLACES, ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clean(*shape: int, seed: int = 1) -> Tensor:
    """Images in the unit box, many values at its bounds."""
    return (draw(*shape, seed=seed) * 0.5 + 0.5).clamp_(0, 1)


def windows(at: tuple[int, int] | None, side: float, height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Every window of the region, in reading order; those at a fixed place end with the image."""
    if at is not None:
        tall, wide = (int(min(side, n - a)) for n, a in zip((height, width), at))
        yield slice(at[0], at[0] + tall), slice(at[1], at[1] + wide)
        return
    tall, wide = int(min(side, height)), int(min(side, width))
    for top, left in itertools.product(range(height - tall + 1), range(width - wide + 1)):
        yield slice(top, top + tall), slice(left, left + wide)


# --- geometry ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 5, 5), (3, 5, 7), (2, 6, 4)]),
    at=st.sampled_from(PLACES[:3]),
    box=st.sampled_from([UNIT, (0.0, math.inf), (-math.inf, math.inf)]),
)
def test_the_projection_is_the_nearest_point(
    seed: int, shape: tuple[int, int, int], at: tuple[int, int] | None, box: tuple[float, float]
) -> None:
    x0 = clean(6, *shape, seed=seed)
    x = x0 + draw(6, *shape, seed=seed + 1)
    x[4] = x0[4] + (x[4] - x0[4]).sign() * 0.25  # ties wherever the box leaves room
    eps = torch.tensor([0.0, 1.0, 2.0, 3.0, 2.0, math.inf], dtype=torch.float64)
    got = Patch(1, at).project(x, x0, eps, box)
    for i, side in enumerate(eps.tolist()):
        best, point = math.inf, x0[i]
        for rows, columns in windows(at, side, *shape[1:]):
            near = x0[i].clone()
            near[:, rows, columns] = x[i, :, rows, columns].clamp(*box)
            away = float((near - x[i]).square().sum())
            if away < best - 1e-12:
                best, point = away, near
        assert float((got[i] - x[i]).square().sum()) == pytest.approx(best, abs=1e-12)
        if i != 4:
            assert torch.equal(got[i], point)
    again = Patch(1, at).project(got, x0, eps, box)
    assert torch.equal(again, got)


def test_an_allowed_point_stays_to_the_last_bit() -> None:
    # beside a large change a tiny one is lost in the sums, and a window without it looks as good
    x0 = torch.full((1, 1, 6, 6), 0.5, dtype=torch.float64)
    x = x0.clone()
    x[0, 0, 2, 2], x[0, 0, 4, 4] = 1.0, 0.5 + 1e-12
    assert torch.equal(Patch(3).project(x, x0, torch.tensor([3.0], dtype=torch.float64), UNIT), x)


def test_gradients_of_any_size_choose_the_same_window() -> None:
    x0, g = clean(5, 2, 6, 6).float() * 255, draw(5, 2, 6, 6, seed=3).float()
    eps, box = torch.full((5,), 2.0), (0.0, 255.0)
    want = Patch(2).extreme(g, x0, eps, box)
    for scale in (1e-30, 1e37):
        assert torch.equal(Patch(2).extreme(g * scale, x0, eps, box), want)


def test_ties_go_to_the_first_window() -> None:
    x0 = torch.zeros(1, 1, 4, 5)
    got = Patch(2).project(torch.ones_like(x0), x0, torch.tensor([2.0]), UNIT)
    assert got.nonzero().tolist() == [[0, 0, i, j] for i in (0, 1) for j in (0, 1)]


@each_place
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_extreme_point_gains_most(at: tuple[int, int] | None, seed: int) -> None:
    x0, g = clean(5, 2, 5, 6, seed=seed), draw(5, 2, 5, 6, seed=seed + 1)
    g[4] *= 1e-200  # the square of it is nothing
    g[3, :, ::2] = 0.0
    eps = torch.tensor([0.0, 1.0, 2.0, 4.0, 3.0], dtype=torch.float64)
    got = Patch(1, at).extreme(g, x0, eps, UNIT)
    assert bool(Patch(1, at).contains(got, x0, eps).all())
    gain = (g * torch.where(g > 0, 1 - x0, -x0)).sum(1)
    for i, side in enumerate(eps.tolist()):
        best = max(float(gain[i][window].sum()) for window in windows(at, side, 5, 6))
        assert float((g[i] * (got[i] - x0[i])).sum()) == pytest.approx(best, rel=1e-9)
        assert bool((got[i] == x0[i])[g[i] == 0].all())


@each_place
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), few=st.integers(0, 4))
def test_the_measure_is_the_smallest_window_that_holds_all(at: tuple[int, int] | None, seed: int, few: int) -> None:
    x0 = clean(3, 2, 5, 7)
    x, generator = x0.clone(), torch.Generator().manual_seed(seed)
    for row in range(3):
        for _ in range(few):
            c, i, j = (int(torch.randint(n, (1,), generator=generator)) for n in (2, 5, 7))
            x[row, c, i, j] += 0.5
    got = Patch(1, at).measure(x, x0)
    for row in range(3):
        changed = (x[row] != x0[row]).any(0)

        def held(side: int, changed: Tensor = changed) -> bool:
            return any(int(changed[w].sum()) == int(changed.sum()) for w in windows(at, side, 5, 7))

        want = next((side for side in range(8) if held(side)), math.inf)
        assert float(got[row]) == want
        for side in range(8):
            inside = Patch(1, at).contains(x[row : row + 1], x0[row : row + 1], torch.tensor([float(side)]))
            assert bool(inside) == (side >= want)


def test_random_starts_lie_in_every_window_alike() -> None:
    x0, eps = clean(900, 1, 4, 5), torch.full((900,), 2.0, dtype=torch.float64)
    x = Patch(2).start(x0, eps, UNIT, torch.arange(900) * 7919)
    assert bool(Patch(2).contains(x, x0, eps).all())
    changed = (x != x0).any(1)
    first = [(int(c.any(1).int().argmax()), int(c.any(0).int().argmax())) for c in changed if int(c.sum()) == 4]
    counts = [first.count(place) for place in itertools.product(range(3), range(4))]
    assert sum(counts) == len(first) > 800
    assert min(counts) > 0.6 * len(first) / 12
    assert max(counts) < 1.5 * len(first) / 12
    values = x[changed.unsqueeze(1)]
    assert 0.45 < float(values.mean()) < 0.55
    fixed = Patch(2, (3, 1)).start(x0, eps, UNIT, torch.arange(900))
    assert set((fixed != x0).any(1).nonzero()[:, 1].tolist()) == {3}  # cut off by the image's end


def test_rows_may_have_windows_of_different_sides() -> None:
    x0, x = clean(4, 1, 6, 6), clean(4, 1, 6, 6, seed=5)
    eps = torch.tensor([1.0, 3.0, 6.0, 0.0], dtype=torch.float64)
    together = Patch(9).project(x, x0, eps, UNIT)
    for i in range(4):
        assert torch.equal(together[i : i + 1], Patch(9).project(x[i : i + 1], x0[i : i + 1], eps[i : i + 1], UNIT))
    assert (together != x0).flatten(1).sum(1).tolist()[::3] == [1, 0]


def test_what_has_no_norm_says_so() -> None:
    g = draw(2, 1, 4, 4)
    for ask in (Patch(2).steepest, Patch(2).dual):
        with pytest.raises(ThreatError, match="follows a norm; got the threat patch"):
            ask(g)
    with pytest.raises(ThreatError, match="follows a norm"):
        Patch(2).shortest(g, g[:, 0, 0, 0], g, UNIT)
    for region in (Patch(2), Patch(2, (1, 1))):
        with pytest.raises(ThreatError, match="Give a finite one"):
            region.extreme(g, g, torch.ones(2), (0.0, math.inf))
        with pytest.raises(ThreatError, match="Give a finite one"):
            region.default_step(torch.ones(2), 10, (-math.inf, 1.0))


# --- threats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("patch:5", Patch(5)),
        ("patch:inf", Patch(math.inf)),
        ("patch@10,12:5", Patch(5, (10, 12))),
        ("patch@0,0:8 in [0, 255]", Patch(8, (0, 0))),
    ],
)
def test_short_forms_come_back(text: str, region: Patch) -> None:
    threat = Threat.parse(text)
    assert threat.region == region
    assert str(threat) == text
    assert Threat.parse(str(threat)) == threat
    assert Threat.from_dict(threat.to_dict()) == threat
    assert threat.with_eps(3).region == Patch(3, region.at)
    assert threat.region.kind == "patch"


@pytest.mark.parametrize("text", ["patch:2.5", "patch:-1", "patch@1:5", "patch@-1,2:5", "patch@1.5,2:5", "patch:x"])
def test_what_is_no_patch_is_refused(text: str) -> None:
    with pytest.raises(ThreatError, match="patch"):
        Threat.parse(text)


@pytest.mark.parametrize("at", [(1,), (1.0, 2), (-1, 0), "12", (True, 1)])
def test_a_place_is_two_whole_numbers(at: object) -> None:
    with pytest.raises(ThreatError, match=r"Give two whole numbers >= 0"):
        Patch(3, at)  # type: ignore[arg-type]


def test_weaker_threats_are_those_whose_windows_lie_inside() -> None:
    regions = [Patch(s, at) for s in (0, 1, 2, 3, math.inf) for at in (None, (0, 0), (1, 1), (1, 2))]
    side = 4

    def changes(region: Patch) -> set[frozenset[tuple[int, int]]]:
        cells = []
        for rows, columns in windows(region.at, region.eps, side, side):
            cells.append(frozenset(itertools.product(range(side)[rows], range(side)[columns])))
        return set(cells)

    for a, b in itertools.product(regions, regions):
        inside = all(any(small <= large for large in changes(b)) for small in changes(a))
        stated = Threat(a) <= Threat(b)
        assert inside or not stated, (a, b)
        if max(a.eps, b.eps) < 3 and a.eps > 0 and b.eps > 0:  # else the image of 4 x 4 hides the difference
            assert stated == inside, (a, b)
    assert not Threat(Patch(2)) <= Threat(L0(4))
    assert not Threat(L0(1)) <= Threat(Patch(1))


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(ThreatError, match=r"square of an image; got inputs of shape \(6,\) under patch:2"):
        mohs.attack(PGD(), relu_net((6,)), inputs(3, 6), torch.zeros(3, dtype=torch.int64), "patch:2")
    net, x = relu_net((1, 4, 4)), inputs(3, 1, 4, 4)
    with pytest.raises(ThreatError, match=r"begins at row 4, column 0; the images have 4 x 4 pixels"):
        mohs.attack(PGD(), net, x, torch.zeros(3, dtype=torch.int64), "patch@4,0:2")
    with pytest.raises(ThreatError, match=r"minimum_norm serves .* such as 'patch:3'"):
        mohs.minimum_norm(net, x, torch.zeros(3, dtype=torch.int64), "patch")
    with pytest.raises(UsageError, match="needs a norm"):
        mohs.evaluation.robustness.relative_sizes(FGSM(), net, x, norm="patch")


# --- attacks ----------------------------------------------------------------------------------------------------------


def highest(model: Linear, x: Tensor, y: Tensor, region: Patch) -> Tensor:
    """Of two classes, the largest margin that a patch reaches on a linear model: the best window at its best bounds."""
    w = (model.weight[:, 1] - model.weight[:, 0]).detach().view(x.shape[1:])
    sign = (1 - 2 * y).to(x).view(-1, 1, 1, 1)
    gain = (sign * w * torch.where(sign * w > 0, 1 - x, -x)).sum(1)
    z = model(x).detach()
    most = [max(float(row[v].sum()) for v in windows(region.at, region.eps, *x.shape[2:])) for row in gain]
    return (sign.flatten() * (z[:, 1] - z[:, 0])) + torch.tensor(most)


@pytest.mark.parametrize("region", [Patch(1), Patch(3), Patch(3, (2, 4)), Patch(4, (4, 1)), Patch(9)], ids=str)
@pytest.mark.parametrize(
    "attack",
    [FGSM(), BIM(steps=8, objective=margin), PGD(steps=8, random_start=False), LaVAN(steps=40)],
    ids=lambda a: type(a).__name__,
)
def test_linear_models_give_way_as_far_as_they_can(attack: object, region: Patch) -> None:
    model, x = Linear(72, 2, seed=2), inputs(20, 2, 6, 6)
    y = model(x).argmax(1)
    out = mohs.attack(attack, model, x, y, Threat(region), stop=Stop.BUDGET)
    want = highest(model, x, y, region)
    torch.testing.assert_close(out.margin, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.success, want > 0)


def test_random_starts_find_the_best_window_of_a_linear_model_with_enough_of_them() -> None:
    model, x = Linear(36, 2, seed=2), inputs(12, 1, 6, 6)
    y = model(x).argmax(1)
    out = mohs.attack(PGD(steps=10, objective=margin), model, x, y, "patch:3", restarts=100, stop=Stop.BUDGET)
    torch.testing.assert_close(out.margin, highest(model, x, y, Patch(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [2, 3, 4, 5])
def test_no_window_tried_lies_over_more_than_half_of_another(side: int) -> None:
    gain = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(side))
    tried = apart(Patch(side), gain, torch.full((4,), float(side)), 6)
    away = (tried.unsqueeze(1) - tried.unsqueeze(2)).abs().amax(3)[:, ~torch.eye(6, dtype=torch.bool)]
    assert int(away.min()) >= side / 2
    # the next better one is let in as soon as no more than half is shared
    ramp = torch.arange(12.0).expand(1, 12, 12).contiguous()
    first, second = apart(Patch(side, at=None), ramp, torch.full((1,), float(side)), 2)[0]
    assert int((first - second).abs().max()) == -(-side // 2)


def test_windows_tried_are_apart_and_in_order_of_their_gain() -> None:
    gain = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(0))
    eps = torch.tensor([3.0, 2.0, 1.0])
    places = apart(Patch(3), gain, eps, 5)
    sums = Patch(3).sums(gain, eps)
    for i, side in enumerate((3, 2, 1)):
        value = [float(sums[i, r, c]) for r, c in places[i].tolist()]
        assert value == sorted(value, reverse=True)
        assert value[0] == pytest.approx(max(float(gain[i][v].sum()) for v in windows(None, side, 9, 8)), rel=1e-6)
        for a, b in itertools.combinations(places[i].tolist(), 2):
            assert max(abs(a[0] - b[0]), abs(a[1] - b[1])) * 2 > side - 1
    few = apart(Patch(3), gain[:1, :3, :3], eps[:1], 2)  # there is one window only
    assert few.tolist() == [[[0, 0], [0, 0]]]


class Turning(nn.Module):
    """One square decides, but the slope at the grey image is wrong about one of its pixels and highest elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0, -2:, -2].sum(1), x[:, 0, -2:, -1].sum(1)
        hidden = torch.relu(a - b - 0.8) * 4 + 0.01 * (a - x[:, 0, -2, -1] + x[:, 0, -1, -1])
        decoy = 0.1 * x[:, 0, :2, :2].sum((1, 2))
        return torch.stack([torch.full_like(hidden, 1.2), hidden + decoy], 1)


def test_the_window_of_the_highest_look_is_climbed_in() -> None:
    net, x = Turning().eval(), torch.full((2, 1, 8, 8), 0.5)
    y = torch.zeros(2, dtype=torch.int64)
    first = Patch(2).extreme(
        torch.autograd.functional.jacobian(lambda z: net(z)[:, 1].sum(), x), x, torch.full((2,), 2.0), UNIT
    )
    assert set((first != x).nonzero()[:, 2].tolist()) == {0, 1}
    out = mohs.attack(LaVAN(steps=60, windows=8), net, x, y, "patch:2")
    assert out.success.all()
    assert int(out.backwards.min()) > 1  # no look was enough by itself
    assert not mohs.attack(LaVAN(steps=60, windows=1), net, x, y, "patch:2").success.any()


class Corner(nn.Module):
    """Says 1 where the last four pixels are alternately bright, in a way that a gradient at the clean input does not see."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0, -2:, -2], x[:, 0, -2:, -1]
        hidden = torch.relu(a.sum(1) - b.sum(1) - 1.5) * 4
        decoy = 0.1 * x[:, 0, :2, :2].sum((1, 2))
        return torch.stack([torch.ones_like(hidden), hidden + decoy + 0.01 * (a.sum(1) - b.sum(1))], 1)


def test_looking_at_windows_gets_past_a_gradient_that_points_elsewhere() -> None:
    net, x = Corner().eval(), torch.full((3, 1, 8, 8), 0.5)
    y = torch.zeros(3, dtype=torch.int64)
    assert not mohs.attack(BIM(steps=40, objective=margin), net, x, y, "patch:2").success.any()
    assert not mohs.attack(LaVAN(windows=1), net, x, y, "patch:2").success.any()
    out = mohs.attack(LaVAN(windows=8), net, x, y, "patch:2")
    assert out.success.all()
    assert out.size.tolist() == [2.0] * 3


def test_restarts_try_other_windows() -> None:
    net, x = Corner().eval(), torch.full((1, 1, 8, 8), 0.5)
    out = mohs.attack(LaVAN(windows=1), net, x, torch.zeros(1, dtype=torch.int64), "patch:2", restarts=6)
    assert out.success.all()
    assert int(out.restart[0]) > 0


def test_looks_at_windows_cost_no_backwards() -> None:
    net, x = relu_net((1, 6, 6)), inputs(4, 1, 6, 6)
    with torch.no_grad():
        net[-1].bias[0] += 50.0
    out = mohs.attack(LaVAN(steps=40, windows=10), net, x, torch.zeros(4, dtype=torch.int64), "patch:1")
    assert (out.forwards.tolist(), out.backwards.tolist()) == ([41] * 4, [30] * 4)
    fixed = mohs.attack(LaVAN(steps=40, windows=10), net, x, torch.zeros(4, dtype=torch.int64), "patch@1,1:1")
    assert (fixed.forwards.tolist(), fixed.backwards.tolist()) == ([41] * 4, [40] * 4)


@pytest.mark.parametrize(
    ("plan", "threat", "control"), [("quick", "patch:4", None), ("quick", "patch@5,5:4", 0), ("standard", "patch:3", 0)]
)
def test_plans_run_under_patches(plan: str, threat: str, control: int | None) -> None:
    data = mohs.data.load("bundled:fashion-mnist", n=10 if control == 0 else 4)
    net = mohs.models.load("bundled:fashion-natural")
    record = mohs.evaluate(net, data, threat, plan=plan, claim="accuracy >= 0.9", control=control)
    assert record.robust_accuracy < record.clean_accuracy
    assert {finding.severity for finding in record.header.checks} <= {"ok", "info"}
    assert all(point.eps == int(point.eps) for point in record.header.curve)
    assert (len(record.header.curve) > 1) == (control is None)
    assert "window" in mohs.reports.words.threat_rows(record.header)[1][1]


def test_the_exam_and_certificates_say_that_they_need_a_norm() -> None:
    data, net = mohs.data.load("bundled:fashion-mnist", n=8), mohs.models.load("bundled:fashion-natural")
    with pytest.raises(ThreatError, match="exam needs a norm"):
        mohs.evaluate(net, data, "patch:3", exam=2)
    with pytest.raises(ThreatError, match="covers balls of a norm"):
        mohs.certify(mohs.certificates.IBP(), net, data.x, data.y, "patch:3")
    with pytest.raises(ThreatError, match="APGD does not serve patch"):
        mohs.attack(mohs.attacks.APGD(), net, data.x, data.y, "patch:3")
