"""DeepFool against exact distances: linear models with and without a box, enumerated ReLU nets, and the paper's algorithm."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from core_models import Counting, Linear, inputs, relu_net, seeded
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mohs
from mohs.attacks import DeepFool
from mohs.errors import ThreatError, UsageError

NORMS = {"l1": 1.0, "l1.5": 1.5, "l2": 2.0, "l3": 3.0, "linf": math.inf}
each_norm = pytest.mark.parametrize("norm", NORMS)
FREE = " in [-inf, inf]"
CLOSE = DeepFool(overshoot=1e-6)


def dual(p: float) -> float:
    return math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)


def pairs(model: Linear) -> tuple[np.ndarray, np.ndarray]:
    """Weight [D, K] and bias [K] with the one-logit model as the pair (0, z)."""
    w, b = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    if model.one:
        w, b = np.concatenate([0 * w, w], 1), np.concatenate([0 * b, b])
    return w, b


def boundaries(model: Linear, x: Tensor, y: Tensor) -> list[list[tuple[float, np.ndarray]]]:
    """For each row, the (gap, normal) of every boundary of its class."""
    w, b = pairs(model)
    z = x.double().numpy() @ w + b
    return [
        [(z[i, y[i]] - z[i, k], w[:, k] - w[:, y[i]]) for k in range(w.shape[1]) if k != int(y[i])]
        for i in range(len(x))
    ]  # fmt: skip


def answers(model: nn.Module, x: Tensor) -> Tensor:
    z = model(x).detach()
    return (z > 0).long() if z.dim() == 1 else z.argmax(1)


# --- linear models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [None, 2, 5], ids=["one logit", "2 classes", "5 classes"])
@each_norm
def test_exact_on_linear_models(norm: str, classes: int | None, dtype: torch.dtype) -> None:
    model, x = Linear(20, classes, dtype=dtype), inputs(40, 20, dtype=dtype)
    y = answers(model, x)
    out = mohs.attack(CLOSE, model, x, y, f"{norm}:inf" + FREE)
    assert out.success.all()
    exact = [min(g / np.linalg.norm(w, dual(NORMS[norm])) for g, w in rows) for rows in boundaries(model, x, y)]
    ratio = out.size.double().numpy() / np.array(exact)
    assert ratio.min() > 1 - 1e-4
    assert ratio.max() < 1.001
    assert (
        int(out.forwards.median()) == 3
    )  # one step and its polish; where the start is within rounding of the boundary it takes more
    assert dtype == torch.float32 or int(out.forwards.max()) <= 4


@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_the_overshoot_is_relative_to_the_change(overshoot: float) -> None:
    model, x = Linear(20, 3, dtype=torch.float64), inputs(20, 20, dtype=torch.float64)
    y = answers(model, x)
    near, far = (mohs.attack(DeepFool(overshoot=o), model, x, y, "l2:inf" + FREE) for o in (1e-9, overshoot))
    torch.testing.assert_close(far.size, near.size * (1 + overshoot), rtol=1e-6, atol=0)


def in_the_box(gap: float, w: np.ndarray, x: np.ndarray, p: float) -> float:
    """Smallest p-norm of r with <w, r> = gap and x + r in the unit box; inf where the box holds no such r."""
    room = np.where(w > 0, 1 - x, x)
    if np.abs(w) @ room < gap:
        return math.inf
    if p == 1:  # where it gains most per unit first
        order = np.argsort(-np.abs(w))
        gains = np.cumsum(np.abs(w[order]) * room[order])
        i = int(np.searchsorted(gains, gap))
        before = gains[i - 1] if i else 0.0
        return float(room[order][:i].sum() + (gap - before) / np.abs(w[order][i]))
    shape = np.abs(w) ** (dual(p) - 1)  # the optimum is the steepest direction, cut at the box

    def at(t: float) -> np.ndarray:
        return np.minimum(t * shape, room)

    low, high = 0.0, 1e9
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.abs(w) @ at(t) < gap else (low, t)
    return float(np.linalg.norm(at(high), p))


@pytest.mark.parametrize("classes", [2, 4])
@each_norm
def test_linear_models_in_a_box(norm: str, classes: int) -> None:
    model, x = Linear(12, classes, seed=2, dtype=torch.float64), inputs(60, 12, seed=3, dtype=torch.float64)
    x = (2.2 * x - 0.6).clamp_(0, 1)  # about half of the numbers at a bound
    y = answers(model, x)
    out = mohs.attack(CLOSE, model, x, y, f"{norm}:inf")
    exact = np.array(
        [
            min(in_the_box(g, w, r.numpy(), NORMS[norm]) for g, w in rows)
            for r, rows in zip(x, boundaries(model, x, y), strict=True)
        ]
    )
    can = np.isfinite(exact)
    assert can.sum() > 20
    found = out.success.numpy()
    assert not found[~can].any()
    assert found[can].mean() > 0.9
    ratio = out.size.numpy()[found] / exact[found]
    assert ratio.min() > 1 - 1e-6
    assert np.median(ratio) < 1.001
    assert ratio.max() < 1.3


def test_units_do_not_matter() -> None:
    # one library's step is off by the width of the box: 35 times too large on inputs in [0, 255]
    model, x = Linear(12, 3), inputs(30, 12)
    y = answers(model, x)

    class Bytes(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return model(z / 255)

    unit = mohs.attack(DeepFool(), model, x, y, "l2:inf")
    byte = mohs.attack(DeepFool(), Bytes(), x * 255, y, "l2:inf in [0, 255]")
    assert torch.equal(unit.success, byte.success)
    torch.testing.assert_close(byte.size, unit.size * 255, rtol=1e-3, atol=0)


# --- small nets by enumeration --------------------------------------------------------------------------------------


def nearest_by_enumeration(net: nn.Sequential, x: np.ndarray, y: int) -> float:
    """Exact Linf distance to another class: a linear programme on every activation region of the hidden layer."""
    a, c = net[1].weight.detach().double().numpy(), net[1].bias.detach().double().numpy()
    v, d = net[3].weight.detach().double().numpy(), net[3].bias.detach().double().numpy()
    features, best = len(x), math.inf
    for pattern in itertools.product([0.0, 1.0], repeat=len(c)):
        on = np.array(pattern)
        sign = 1 - 2 * on  # sign * (a x' + c) <= 0
        w, b = (v * on) @ a, (v * on) @ c + d
        for k in set(range(len(d))) - {y}:
            # variables x', t: minimise t with |x' - x| <= t, z_k >= z_y, and the pattern
            rows = [np.c_[sign[:, None] * a, np.zeros(len(c))], [[*(w[y] - w[k]), 0.0]]]
            limits = [-sign * c, [b[k] - b[y]]]
            eye = np.eye(features)
            rows += [np.c_[eye, -np.ones(features)], np.c_[-eye, -np.ones(features)]]
            limits += [x, -x]
            got = linprog([*np.zeros(features), 1.0], A_ub=np.concatenate(rows), b_ub=np.concatenate(limits),
                          bounds=[(None, None)] * features + [(0, None)])  # fmt: skip
            if got.status == 0:
                best = min(best, got.fun)
    return best


def test_small_relu_nets_within_a_factor_of_the_truth() -> None:
    ratios = []
    for seed in range(6):
        net = relu_net((3,), classes=3, hidden=4, seed=seed).double()
        x = inputs(4, 3, seed=seed, dtype=torch.float64)
        y = net(x).argmax(1)
        out = mohs.attack(CLOSE, net, x, y, "linf:inf" + FREE)
        for i in out.success.nonzero().flatten().tolist():
            ratios.append(float(out.size[i]) / nearest_by_enumeration(net, x[i].numpy(), int(y[i])))
    assert len(ratios) >= 20
    assert min(ratios) > 1 - 1e-6  # never below the truth
    assert np.median(ratios) < 1.05
    assert max(ratios) < 4  # it walks to the first boundary it sees, which need not be the nearest


# --- the paper's algorithm ------------------------------------------------------------------------------------------


def paper(net: nn.Module, x0: Tensor, label: int, overshoot: float, steps: int) -> Tensor:
    """Algorithm 2 of the paper for L2, for one input, with the overshoot inside the loop as in the authors' code."""
    x, total = x0.clone(), torch.zeros_like(x0)
    for _ in range(steps):
        point = x.clone().requires_grad_(True)
        z = net(point.unsqueeze(0))[0]
        if int(z.argmax()) != label:
            break
        slopes = [torch.autograd.grad(v, point, retain_graph=True)[0] for v in z]
        best, r = math.inf, torch.zeros_like(x)
        for k in range(len(z)):
            if k == label:
                continue
            w, f = slopes[k] - slopes[label], float((z[k] - z[label]).detach())
            distance = abs(f) / float(w.norm())
            if distance < best:
                best, r = distance, abs(f) / float(w.norm()) ** 2 * w
        total = total + (1 + overshoot) * r
        x = x0 + total
    return x


def test_revisiting_all_candidates_is_the_papers_algorithm() -> None:
    net = relu_net((10,), classes=5, hidden=30, seed=4).double()
    x = inputs(20, 10, dtype=torch.float64)
    y = net(x).argmax(1)
    out = mohs.attack(DeepFool(candidates=4, revisit=4, polish=0), net, x, y, "l2:inf" + FREE)
    assert out.success.all()
    want = torch.stack([paper(net, x[i], int(y[i]), 0.02, 50) for i in range(20)])
    torch.testing.assert_close(out.x, want, rtol=0, atol=1e-9)
    assert int(out.forwards.max()) > 2, "too easy a net: every row crossed at once"


def test_revisiting_few_costs_little() -> None:
    net = relu_net((10,), classes=8, hidden=30, seed=4)
    x = inputs(40, 10)
    y = net(x).argmax(1)
    few, all_of_them = (
        mohs.attack(DeepFool(candidates=7, revisit=r, polish=0), net, x, y, "l2:inf" + FREE) for r in (2, 7)
    )
    assert few.success.all()
    assert float(few.size.mean()) < 1.02 * float(all_of_them.size.mean())
    assert int(few.backwards.sum()) < int(all_of_them.backwards.sum())


# --- targets, cost, memory ------------------------------------------------------------------------------------------


@each_norm
def test_targeted_is_exact_on_linear_models_of_two_classes_and_reaches_the_class_otherwise(norm: str) -> None:
    x = inputs(30, 15, dtype=torch.float64)
    two = Linear(15, 2, dtype=torch.float64)
    y = answers(two, x)
    same = mohs.attack(CLOSE, two, x, y, f"{norm}:inf" + FREE, targets=1 - y)
    torch.testing.assert_close(same.size, mohs.attack(CLOSE, two, x, y, f"{norm}:inf" + FREE).size, rtol=1e-6, atol=0)
    five = Linear(15, 5, dtype=torch.float64)
    y = answers(five, x)
    targets = (y + 1 + torch.arange(30) % 4) % 5
    out = mohs.attack(CLOSE, five, x, y, f"{norm}:inf" + FREE, targets=targets)
    assert out.success.all()
    assert torch.equal(answers(five, out.x), targets)
    least = mohs.attack(CLOSE, five, x, y, f"{norm}:inf" + FREE)
    assert bool((out.size >= least.size * (1 - 1e-6)).all())
    assert torch.equal(
        out.backwards, out.forwards - 1
    )  # one boundary per step; the look at the polished point needs none


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor of numbers any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.dtype != torch.uint8:  # an untouched block that only speaks to the allocator
                self.numel = max(self.numel, t.numel())
        return out


def test_memory_holds_no_jacobian() -> None:
    net = relu_net((300,), classes=40, hidden=20)
    x = inputs(8, 300)
    y = net(x).argmax(1)
    with Largest() as seen:
        mohs.attack(DeepFool(steps=3, candidates=39, revisit=39), net, x, y, "l2:inf", batch=8)
    wave = 8 * 300
    assert seen.numel <= 2 * max(wave, 300 * 20)
    assert seen.numel < 8 * 40 * 300 / 4


def test_backwards_are_candidates_at_first_and_revisits_later() -> None:
    net = relu_net((6,), classes=9)
    with torch.no_grad():
        net[-1].bias[0] += 50.0  # out of reach inside the box
    model = Counting(net)
    mohs.attack(
        DeepFool(steps=4, candidates=5, revisit=2), model, inputs(3, 6), torch.zeros(3, dtype=torch.int64), "l2:inf"
    )
    assert (model.forwards, model.backwards) == (5, 5 + 3 * 2)


def test_a_row_without_gradients_gives_up_at_once() -> None:
    class Flat(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0]) + 0 * z.sum(1, keepdim=True)

    out = mohs.attack(DeepFool(), Flat(), inputs(3, 6), torch.zeros(3, dtype=torch.int64), "l2:inf")
    assert out.forwards.tolist() == [1, 1, 1]
    assert out.size.isinf().all()
    assert torch.equal(out.x, inputs(3, 6))


def test_at_a_finite_radius_only_what_lies_inside_counts() -> None:
    model, x = Linear(20, 3), inputs(60, 20)
    y = answers(model, x)
    free = mohs.attack(DeepFool(), model, x, y, "l2:inf")
    eps = float(free.size.median())
    out = mohs.attack(DeepFool(), model, x, y, f"l2:{eps}")
    assert torch.equal(out.success, free.size <= eps * (1 + 1e-5))
    assert bool((out.x - x).norm(dim=1).le(eps * (1 + 1e-4)).all())


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"candidates": 0}, {"revisit": 1.5}, {"overshoot": -0.1}, {"overshoot": math.nan}]
)
def test_wrong_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        DeepFool(**bad)


def test_l0_is_no_norm() -> None:
    net, x = relu_net((6,)), inputs(2, 6)
    with pytest.raises(ThreatError, match="l0"):
        mohs.attack(DeepFool(), net, x, net(x).argmax(1), "l0:inf")


def test_random_small_models_never_beat_the_truth() -> None:
    g = seeded(8)
    for seed in range(10):
        features, classes = int(torch.randint(1, 9, (), generator=g)), int(torch.randint(2, 6, (), generator=g))
        model, x = Linear(features, classes, seed=seed), inputs(16, features, seed=seed)
        y = answers(model, x)
        for norm, p in NORMS.items():
            out = mohs.attack(CLOSE, model, x, y, f"{norm}:inf" + FREE)
            exact = np.array([min(b / np.linalg.norm(w, dual(p)) for b, w in rows) for rows in boundaries(model, x, y)])
            found = out.success.numpy()
            assert (out.size.numpy()[found] >= exact[found] * (1 - 1e-3) - 1e-6).all()


def test_each_polish_looks_once_more_and_never_loses() -> None:
    net, x = relu_net((6,), hidden=32), inputs(64, 6)
    y = net(x).argmax(1)
    none, once, thrice = (mohs.attack(DeepFool(polish=p), net, x, y, "l2:inf") for p in (0, 1, 3))
    assert bool((once.size <= none.size).all())
    assert bool((thrice.size <= once.size).all())
    assert bool((thrice.size < once.size).any())
    assert int(none.forwards.sum()) < int(once.forwards.sum()) < int(thrice.forwards.sum())
