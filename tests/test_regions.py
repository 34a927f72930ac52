"""Regions against truth: nearest points, extreme points and dual norms computed another way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from mohs import L0, L1, L2, Linf, Lp, Threat
from mohs.errors import ThreatError
from mohs.regions import Region

NORMS: list[Lp] = [Linf(1.0), L2(1.0), L1(1.0), Lp(1.5, 1.0), Lp(3.0, 1.0), Lp(7.3, 1.0)]
ALL: list[Region] = [*NORMS, L0(1), L0(1, features=True)]
UNIT, OPEN = (0.0, 1.0), (-math.inf, math.inf)
ids = lambda r: r.name  # noqa: E731


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clean(*shape: int, seed: int = 1) -> Tensor:
    """Inputs in the unit box, a third of them at its bounds."""
    return (draw(*shape, seed=seed) * 0.5 + 0.5).clamp_(0, 1)


def radii(region: Region, rows: int) -> Tensor:
    if isinstance(region, L0):
        return torch.arange(rows, dtype=torch.float64) % 5
    return torch.linspace(0.0, 1.5, rows, dtype=torch.float64)


def keys(rows: int) -> Tensor:
    return torch.arange(rows, dtype=torch.int64) * 7919 - 3


# --- projection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [UNIT, OPEN, (0.0, math.inf)], ids=str)
@pytest.mark.parametrize("region", ALL, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_lands_in_region_and_box_and_stays(
    region: Region, box: tuple[float, float], dtype: torch.dtype
) -> None:
    x0 = clean(40, 3, 4, 5).to(dtype)
    x = (x0 + draw(40, 3, 4, 5, seed=2)).to(dtype)
    eps = radii(region, 40).to(dtype)
    p = region.project(x, x0, eps, box)
    assert p.shape == x.shape
    assert p.dtype == dtype
    assert bool(region.contains(p, x0, eps).all())
    assert bool((p >= box[0]).all())
    assert bool((p <= box[1]).all())
    torch.testing.assert_close(region.project(p, x0, eps, box), p, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert torch.equal(p[0], x0[0])  # radius 0


@pytest.mark.parametrize("region", ALL, ids=ids)
def test_projection_leaves_a_feasible_point_alone(region: Region) -> None:
    x0 = clean(30, 3, 4, 5)
    x = x0.clone()
    x[:, :, 1, 2] = 0.5 * (x0[:, :, 1, 2] + 0.5)
    eps = torch.full((30,), 3.0, dtype=torch.float64)
    torch.testing.assert_close(region.project(x, x0, eps, UNIT), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("region", ALL, ids=ids)
def test_projection_does_not_mutate(region: Region) -> None:
    x0, x, eps = clean(6, 2, 3, 3), draw(6, 2, 3, 3, seed=3), radii(region, 6)
    before = [t.clone() for t in (x0, x, eps)]
    g = draw(6, 2, 3, 3, seed=4)
    g_before = g.clone()
    region.project(x, x0, eps, UNIT)
    region.move(x, g, eps, x0, UNIT)
    region.extreme(g, x0, eps, UNIT)
    region.start(x0, eps, UNIT, keys(6))
    region.measure(x, x0)
    if not isinstance(region, L0):
        region.steepest(g)
        region.dual(g)
    for now, then in zip((x0, x, eps, g), (*before, g_before), strict=True):
        assert torch.equal(now, then)


def nearest_l1(d: np.ndarray, lo: np.ndarray, hi: np.ndarray, eps: float) -> np.ndarray:
    """min ||r - d||_2 over lo <= r <= hi, ||r||_1 <= eps, by bisection on the multiplier of the norm."""

    def at(t: float) -> np.ndarray:
        return np.clip(np.sign(d) * np.maximum(np.abs(d) - t, 0), lo, hi)

    if np.abs(at(0.0)).sum() <= eps:
        return at(0.0)
    low, high = 0.0, float(np.abs(d).max())
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.abs(at(t)).sum() > eps else (low, t)
    return at(high)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), features=st.integers(1, 40), box=st.sampled_from([UNIT, OPEN, (0.0, math.inf)]))
def test_l1_projection_is_the_nearest_point(seed: int, features: int, box: tuple[float, float]) -> None:
    x0 = clean(5, features, seed=seed)
    d = draw(5, features, seed=seed + 1, scale=2.0)
    d[1] = d[1].sign()  # ties everywhere
    eps = torch.tensor([0.0, 0.3, 1.0, 2.5, 100.0], dtype=torch.float64)
    got = L1(1.0).project(x0 + d, x0, eps, box) - x0
    for i in range(5):
        want = nearest_l1(d[i].numpy(), box[0] - x0[i].numpy(), box[1] - x0[i].numpy(), float(eps[i]))
        np.testing.assert_allclose(got[i].numpy(), want, atol=1e-9)


def test_l1_projection_in_single_precision_on_an_image() -> None:
    x0 = clean(8, 3, 32, 32)
    x = x0 + draw(8, 3, 32, 32, seed=5, scale=0.3)
    eps = torch.linspace(1, 60, 8, dtype=torch.float64)
    exact = L1(1.0).project(x, x0, eps, UNIT)
    single = L1(1.0).project(x.float(), x0.float(), eps.float(), UNIT)
    torch.testing.assert_close(single.double(), exact, atol=2e-5, rtol=0)
    used = L1(1.0).measure(single, x0.float())
    assert bool((used >= 0.9999 * eps.float()).all())  # nothing is given away


def test_linf_projection_is_the_nearest_point() -> None:
    x0, x = clean(20, 30), draw(20, 30, seed=6)
    eps = radii(Linf(1.0), 20)
    want = np.clip(
        x.numpy(), np.maximum(x0.numpy() - eps.numpy()[:, None], 0), np.minimum(x0.numpy() + eps.numpy()[:, None], 1)
    )
    np.testing.assert_allclose(Linf(1.0).project(x, x0, eps, UNIT).numpy(), want, atol=1e-15)


def test_l2_projection_without_a_box_is_the_nearest_point() -> None:
    x0, d = clean(20, 30), draw(20, 30, seed=7)
    eps = radii(L2(1.0), 20)
    want = d * (eps / d.norm(dim=1)).clamp(max=1).unsqueeze(1)
    torch.testing.assert_close(L2(1.0).project(x0 + d, x0, eps, OPEN) - x0, want, atol=1e-14, rtol=0)


@pytest.mark.parametrize("features", [False, True])
def test_l0_projection_is_the_nearest_point(features: bool) -> None:
    x0, x = clean(6, 2, 2, 3), draw(6, 2, 2, 3, seed=8)
    region = L0(2, features=features)
    got = region.project(x, x0, torch.full((6,), 2.0, dtype=torch.float64), UNIT)
    places = list(itertools.product(*(range(n) for n in ((2, 2, 3) if features else (2, 3)))))
    for i in range(6):
        best = math.inf
        for pair in itertools.combinations(places, 2):
            point = x0[i].clone()
            for place in pair:
                where = place if features else (slice(None), *place)
                point[where] = x[i][where].clamp(0, 1)
            best = min(best, float((point - x[i]).norm()))
        assert float((got[i] - x[i]).norm()) == pytest.approx(best, abs=1e-12)


def test_l0_counts_pixels_or_numbers() -> None:
    x0 = torch.zeros(1, 3, 2, 2)
    x = x0.clone()
    x[0, :, 0, 1] = 0.5
    x[0, 1, 1, 1] = 0.5
    assert L0(1).measure(x, x0).tolist() == [2.0]
    assert L0(1, features=True).measure(x, x0).tolist() == [4.0]
    assert L0(1).measure(x.flatten(1), x0.flatten(1)).tolist() == [4.0]  # without an image every number is a position


# --- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ALL, ids=ids)
def test_starts_lie_inside_move_and_repeat(region: Region) -> None:
    x0 = clean(64, 3, 4, 5).float()
    eps = torch.full((64,), 2.0 if isinstance(region, L0) else 0.7)
    a, b = region.start(x0, eps, UNIT, keys(64)), region.start(x0, eps, UNIT, keys(64))
    assert torch.equal(a, b)
    assert bool(region.contains(a, x0, eps).all())
    assert bool((a >= 0).all())
    assert bool((a <= 1).all())
    assert bool((region.measure(a, x0) > 0).all())
    assert len(torch.unique(a - x0, dim=0)) == 64  # no two rows move alike
    assert torch.equal(region.start(x0[5:9], eps[5:9], UNIT, keys(64)[5:9]), a[5:9])


@pytest.mark.parametrize(("region", "power"), [(L2(1.0), 6), (L1(1.0), 6), (Linf(1.0), None)], ids=str)
def test_starts_are_uniform_in_the_ball(region: Lp, power: int | None) -> None:
    x0 = torch.full((4000, power or 6), 0.5)
    size = region.measure(region.start(x0, torch.full((4000,), 0.4), OPEN, keys(4000)), x0) / 0.4
    # the volume inside radius r is r^D, so size^D is uniform: mean 1/2, variance 1/12
    u = size.double() ** 6
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 4000)
    assert float(u.max()) > 0.99


# --- steepest directions and dual norms -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), features=st.integers(1, 12), which=st.sampled_from(NORMS))
def test_steepest_gains_the_dual_norm_and_nobody_gains_more(seed: int, features: int, which: Lp) -> None:
    g = draw(4, features, seed=seed)
    step = which.steepest(g)
    gain = (g * step).sum(1)
    q = math.inf if which.p == 1 else 1.0 if math.isinf(which.p) else which.p / (which.p - 1)
    want = np.linalg.norm(g.numpy(), ord=q, axis=1)
    np.testing.assert_allclose(gain.numpy(), want, rtol=1e-9)
    np.testing.assert_allclose(which.dual(g).numpy(), want, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(step.numpy(), ord=which.p, axis=1), 1.0, rtol=1e-9)
    rivals = draw(200, features, seed=seed + 1)
    rivals = rivals / torch.linalg.vector_norm(rivals, which.p, dim=1, keepdim=True)
    assert bool((rivals @ g.T <= gain * (1 + 1e-9)).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("region", NORMS, ids=ids)
def test_steps_do_not_depend_on_the_scale_of_the_gradient(region: Lp, scale: float) -> None:
    g = draw(5, 37).float()
    torch.testing.assert_close(region.steepest(g * scale), region.steepest(g), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(region.dual(g * scale), region.dual(g) * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("box", [UNIT, (0.0, 255.0)], ids=str)
@pytest.mark.parametrize("region", ALL, ids=ids)
def test_a_zero_gradient_moves_nothing(region: Region, box: tuple[float, float]) -> None:
    x0 = clean(3, 2, 3, 3).float() * box[1]
    g, size = torch.zeros_like(x0), region.default_step(torch.full((3,), 5.0), 10, box)
    assert torch.equal(region.move(x0, g, size, x0, box), x0)
    torch.testing.assert_close(region.extreme(g, x0, torch.full((3,), 5.0), box), x0)
    if not isinstance(region, L0):
        assert not region.steepest(g).any()
        assert region.dual(g).tolist() == [0.0] * 3


@pytest.mark.parametrize("region", ALL, ids=ids)
def test_a_row_without_gradient_does_not_disturb_its_neighbours(region: Region) -> None:
    x0, g = clean(3, 2, 3, 3).float(), draw(3, 2, 3, 3, seed=9).float()
    g[1] = 0
    size = torch.full((3,), 0.1)
    moved = region.move(x0, g, size, x0, UNIT)
    assert torch.equal(moved[1], x0[1])
    for i in (0, 2):
        assert torch.equal(moved[i : i + 1], region.move(x0[i : i + 1], g[i : i + 1], size[:1], x0[i : i + 1], UNIT))


def test_one_coordinate() -> None:
    x0, g = torch.tensor([[0.5], [0.9]]), torch.tensor([[2.0], [3.0]])
    for region in NORMS:
        got = region.extreme(g, x0, torch.tensor([0.2, 0.2]), UNIT)
        torch.testing.assert_close(got, torch.tensor([[0.7], [1.0]]))


def test_l1_step_skips_what_the_box_stops() -> None:
    x = torch.tensor([[1.0, 0.5, 0.0]])
    g = torch.tensor([[9.0, 1.0, -5.0]])
    assert L1(1.0).move(x, g, torch.tensor([0.25]), x, UNIT).tolist() == [[1.0, 0.75, 0.0]]


# --- extreme points -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), features=st.integers(1, 8), box=st.sampled_from([UNIT, (0.0, math.inf), OPEN]))
def test_l1_extreme_is_the_solution_of_the_linear_programme(seed: int, features: int, box: tuple[float, float]) -> None:
    x0, g = clean(3, features, seed=seed), draw(3, features, seed=seed + 1)
    eps = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    got = L1(1.0).extreme(g, x0, eps, box)
    assert bool(L1(1.0).contains(got, x0, eps).all())
    for i in range(3):
        up, down = box[1] - x0[i].numpy(), x0[i].numpy() - box[0]
        best = linprog(
            np.concatenate([-g[i].numpy(), g[i].numpy()]), A_ub=np.ones((1, 2 * features)), b_ub=[float(eps[i])],
            bounds=[(0, None if math.isinf(b) else b) for b in np.concatenate([up, down])],
        )  # fmt: skip
        assert float((g[i] * (got[i] - x0[i])).sum()) == pytest.approx(-best.fun, abs=1e-9)


def test_linf_extreme_is_the_best_corner() -> None:
    x0, g = clean(10, 6), draw(10, 6, seed=10)
    eps = radii(Linf(1.0), 10)
    got = Linf(1.0).extreme(g, x0, eps, UNIT)
    for i in range(10):
        corners = [
            np.clip(x0[i].numpy() + eps[i].item() * np.array(s), 0, 1) for s in itertools.product((-1, 1), repeat=6)
        ]
        assert float(g[i] @ got[i]) == pytest.approx(max(float(c @ g[i].numpy()) for c in corners))


@pytest.mark.parametrize("features", [False, True])
def test_l0_extreme_is_the_best_choice_of_positions(features: bool) -> None:
    x0, g = clean(8, 2, 2, 2), draw(8, 2, 2, 2, seed=11)
    g[3] = 0
    got = L0(2, features=features).extreme(g, x0, torch.full((8,), 2.0, dtype=torch.float64), UNIT)
    gain = torch.where(g > 0, g * (1 - x0), -g * x0)
    gain = gain.flatten(1) if features else gain.sum(1).flatten(1)
    want = gain.topk(2, dim=1).values.sum(1)
    torch.testing.assert_close((g * (got - x0)).flatten(1).sum(1), want)


@pytest.mark.parametrize("region", [L2(1.0), Lp(3.0, 1.0)], ids=ids)
def test_extreme_without_a_box_gains_the_dual_norm(region: Lp) -> None:
    x0, g, eps = clean(10, 6), draw(10, 6, seed=12), radii(region, 10)
    got = region.extreme(g, x0, eps, OPEN)
    torch.testing.assert_close((g * (got - x0)).sum(1), eps * region.dual(g))


# --- membership, sizes, refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", NORMS, ids=ids)
def test_membership_is_strict_beyond_rounding(region: Lp) -> None:
    x0 = torch.full((2, 10), 0.5)
    direction = region.steepest(draw(2, 10, seed=13).float())
    eps = torch.tensor([0.1, 0.1])
    assert region.contains(x0 + 0.1 * direction, x0, eps).tolist() == [True, True]
    assert region.contains(x0 + 0.1002 * direction, x0, eps).tolist() == [False, False]


@pytest.mark.parametrize("region", NORMS, ids=ids)
def test_sizes_are_norms(region: Lp) -> None:
    x0, x = clean(4, 3, 2, 2), draw(4, 3, 2, 2, seed=14)
    want = np.linalg.norm((x - x0).flatten(1).numpy(), ord=region.p, axis=1)
    np.testing.assert_allclose(region.measure(x, x0).numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("bad", [lambda: Linf(-0.1), lambda: L2(math.nan), lambda: L0(1.5), lambda: L0(-1),
                                 lambda: Lp(0.5, 1.0), lambda: Lp(math.nan, 1.0), lambda: L1("1")])  # fmt: skip
def test_refuses_what_is_no_ball(bad: Callable[[], object]) -> None:
    with pytest.raises(ThreatError):
        bad()


def test_l0_needs_a_finite_box() -> None:
    x0, eps = torch.zeros(1, 3), torch.ones(1)
    for call in (lambda: L0(1).start(x0, eps, OPEN, keys(1)), lambda: L0(1).extreme(x0, x0, eps, OPEN)):
        with pytest.raises(ThreatError, match="finite"):
            call()


@pytest.mark.parametrize("p", [1.25, 4.0, 7.3])
def test_powers_give_the_same_bits_wherever_a_row_stands(p: float) -> None:
    # vector loops and their scalar tails may round differently: 7 x 37 numbers leave a tail inside the last row
    g, x0 = draw(7, 37).float(), clean(7, 37).float()
    region, eps = Lp(p, 1.0), torch.full((7,), 0.7)
    for shift in range(1, 7):
        assert torch.equal(region.steepest(g.roll(shift, 0)), region.steepest(g).roll(shift, 0))
        starts = region.start(x0, eps, UNIT, keys(7))
        assert torch.equal(region.start(x0.roll(shift, 0), eps, UNIT, keys(7).roll(shift)), starts.roll(shift, 0))


@pytest.mark.parametrize("form", ["linf", "l2", "l1", "l3"])
@pytest.mark.parametrize("box", [(0.0, 1.0), (-math.inf, math.inf)], ids=["box", "no box"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_shortest_change_is_what_a_solver_finds(form: str, box: tuple[float, float], seed: int) -> None:
    random = np.random.default_rng(seed)
    w, x = random.normal(size=6), random.choice([0.0, 1.0, 0.3, 0.7], size=6)
    w[random.random(6) < 0.2] = 0.0
    if not w.any():
        return
    room = np.where(w > 0, box[1] - x, x - box[0])
    most = float(np.abs(w) @ np.where(w == 0, 0.0, np.minimum(room, 10.0)))
    gain = most * random.uniform(0.05, 0.95)
    region = Threat.parse(f"{form}:inf").region
    batch = torch.tensor(np.stack([w, -w, w]))  # the mates end earlier or later; none may move another
    found = region.shortest(
        batch, torch.tensor([gain, 0.0, gain * 0.5], dtype=torch.float64), torch.tensor(np.stack([x] * 3)), box
    )[0]
    alone = region.shortest(
        batch[[0, 0]], torch.tensor([gain, gain], dtype=torch.float64), torch.tensor(np.stack([x] * 2)), box
    )[0]
    assert torch.equal(found, alone)
    assert found.numpy() @ w == pytest.approx(gain, rel=1e-9)
    assert bool(((x + found.numpy() >= box[0]) & (x + found.numpy() <= box[1])).all())
    bounds = [(max(box[0] - v, -1000.0), min(box[1] - v, 1000.0)) for v in x]
    assert float(region.measure(found[None], torch.zeros(1, 6))) == pytest.approx(
        _least(form, w, gain, bounds), rel=1e-4
    )


def _least(form: str, w: np.ndarray, gain: float, bounds: list[tuple[float, float]]) -> float:
    """The smallest norm of r with <w, r> = gain inside the bounds: linear programs, SLSQP for the smooth norms."""
    n = len(w)
    if form in ("l2", "l3"):
        p = float(form[1:])
        start = np.clip(np.sign(w), *np.array(bounds).T)
        start *= gain / (w @ start)
        line = {"type": "eq", "fun": lambda r: w @ r - gain, "jac": lambda r: w}
        done = minimize(
            lambda r: (np.abs(r) ** p).sum(), start, jac=lambda r: p * np.abs(r) ** (p - 1) * np.sign(r),
            bounds=bounds, constraints=[line], method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000},
        )  # fmt: skip
        return float(done.fun ** (1 / p))
    eye = np.eye(n)
    slack = np.ones((n, 1)) if form == "linf" else eye
    bound = np.block([[eye, -slack], [-eye, -slack]])
    cost = np.concatenate([np.zeros(n), np.ones(slack.shape[1])])
    line = np.concatenate([w, np.zeros(slack.shape[1])])[None]
    return float(linprog(cost, bound, np.zeros(2 * n), line, [gain], bounds + [(0, None)] * slack.shape[1]).fun)


@pytest.mark.parametrize(
    ("form", "w", "gain"),
    [("l1.1", [1.0, 1e-4, 0.0], 1.0), ("l2", [1.0, 1e-20, 0.0], 1.0), ("linf", [1e-37, 0.0], 100.0)],
)
def test_the_shortest_change_stays_finite_where_no_change_gains_that_much(
    form: str, w: list[float], gain: float
) -> None:
    found = Threat.parse(f"{form}:inf").region.shortest(
        torch.tensor([w] * 2), torch.tensor([gain] * 2), torch.full((2, len(w)), 0.5), UNIT
    )
    assert bool(found.isfinite().all())
    assert float(found[0, 0]) == 0.5  # to the corner
    assert float(found[0, -1]) == 0.0
