"""The searches for the smallest change: exact on linear models with and without a box, near the truth on small nets."""

from __future__ import annotations

import math

import pytest
import torch
from core_models import Linear, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.attacks import ALMA, DDN, FMN, PDGD, PDPGD, DeepFool, SuperDeepFool, TrustRegion
from mohs.attacks.pdpgd import proximal
from mohs.errors import ThreatError, UsageError
from mohs.objectives import margin
from mohs.problem import Findings, Goal, Problem
from mohs.target import Target
from mohs.threat import Threat

FREE = " in [-inf, inf]"

# attack, and by how much it may miss the optimum of a linear model in a norm
ATTACKS = [
    (DDN(), {"l2": 1.01}),
    (FMN(), {"linf": 1.01, "l2": 1.01, "l1": 1.02}),
    (PDGD(steps=150), {"l2": 1.03}),
    (PDPGD(steps=150), {"linf": 1.03, "l2": 1.03, "l1": 1.03}),
    (ALMA(steps=200), {"l2": 1.05, "l1": 1.4}),  # in L1 its plain gradient finds no exact zeros
    (SuperDeepFool(), {"linf": 1.001, "l2": 1.001, "l3": 1.001, "l1": 1.001}),
    (TrustRegion(), {"linf": 1.001, "l2": 1.001, "l3": 1.001, "l1": 1.001}),
]
CASES = [(attack, norm, slack) for attack, norms in ATTACKS for norm, slack in norms.items()]
each_case = pytest.mark.parametrize(
    ("attack", "norm", "slack"), CASES, ids=[f"{type(a).__name__}-{n}" for a, n, _ in CASES]
)
each_attack = pytest.mark.parametrize("attack", [a for a, _ in ATTACKS], ids=lambda a: type(a).__name__)


def optimum(model: Linear, x: Tensor, y: Tensor, norm: str, box: tuple[float, float]) -> Tensor:
    """The smallest size of a change that ties two classes, over all boundaries; inf where the box holds none."""
    region, best = Threat.parse(f"{norm}:inf").region, torch.full((len(x),), math.inf, dtype=x.dtype)
    logits, weight = model(x).detach(), model.weight.detach()
    for k in range(logits.shape[1]):
        w = (weight[:, k] - weight[:, y].T).contiguous()
        gap = logits.gather(1, y.unsqueeze(1)).squeeze(1) - logits[:, k]
        r = region.shortest(w, gap, x, box)
        reached = (w * r).sum(1) >= gap * (1 - 1e-9)
        size = region.measure(x + r, x)
        best = torch.where(reached & (y != k), torch.minimum(size, best), best)
    return best


# --- linear models ---------------------------------------------------------------------------------------------------


@each_case
def test_linear_models_without_a_box(attack: object, norm: str, slack: float) -> None:
    model, x = Linear(20, 3, dtype=torch.float64), inputs(12, 20, dtype=torch.float64)
    y = model(x).argmax(1)
    out = mohs.attack(attack, model, x, y, f"{norm}:inf" + FREE)
    assert out.success.all()
    ratio = out.size / optimum(model, x, y, norm, (-math.inf, math.inf))
    assert float(ratio.min()) > 1 - 1e-6
    assert float(ratio.median()) < slack
    assert float(ratio.max()) < 3  # it may settle on another class


@each_case
def test_linear_models_in_a_box(attack: object, norm: str, slack: float) -> None:
    model, x = Linear(12, 3, seed=2, dtype=torch.float64), inputs(24, 12, seed=3, dtype=torch.float64)
    x = (2.2 * x - 0.6).clamp_(0, 1)  # about half of the numbers at a bound
    y = model(x).argmax(1)
    exact = optimum(model, x, y, norm, (0.0, 1.0))
    out = mohs.attack(attack, model, x, y, f"{norm}:inf")
    can = exact.isfinite()
    assert int(can.sum()) > 10
    assert not out.success[~can].any()
    assert float(out.success[can].double().mean()) > 0.9
    ratio = (out.size / exact)[out.success]
    assert float(ratio.min()) > 1 - 1e-6
    assert float(ratio.median()) < slack


@pytest.mark.parametrize("channels", [1, 3])
def test_fmn_counts_positions(channels: int) -> None:
    net, x = Linear(channels * 25, 3, dtype=torch.float64), inputs(16, channels, 5, 5, dtype=torch.float64)
    y = net(x).argmax(1)
    out = mohs.attack(FMN(steps=100), net, x, y, "l0:inf")
    w = net.weight.detach().T.view(3, 1, channels, 25)
    fewest = torch.full((16,), math.inf, dtype=torch.float64)
    for k in range(3):  # change the positions of largest gain first, each to its best bound
        diff = w[k] - w[y].squeeze(1)
        gain = torch.where(diff > 0, diff * (1 - x.flatten(2)), -diff * x.flatten(2)).sum(1)
        gap = (net(x).gather(1, y.unsqueeze(1)).squeeze(1) - net(x)[:, k]).detach()
        count = (gain.sort(1, descending=True).values.cumsum(1) <= gap.unsqueeze(1)).sum(1) + 1
        fewest = torch.where(y == k, fewest, torch.minimum(fewest, count.double()))
    can = fewest <= 25
    assert out.success[can].all()
    assert bool((out.size[can] >= fewest[can]).all())
    assert float((out.size[can] - fewest[can]).mean()) < 1.0


@each_attack
def test_targets_are_reached(attack: object) -> None:
    norm = attack.norms[-1] if "l2" not in attack.norms else "l2"
    model, x = Linear(15, 4, dtype=torch.float64), inputs(12, 15, dtype=torch.float64)
    y = model(x).argmax(1)
    targets = (y + 1 + torch.arange(12) % 3) % 4
    out = mohs.attack(attack, model, x, y, f"{norm}:inf" + FREE, targets=targets)
    assert out.success.all()
    assert torch.equal(model(out.x).argmax(1), targets)
    least = mohs.attack(DeepFool(overshoot=1e-6), model, x, y, f"{norm}:inf" + FREE, targets=targets)
    assert float((out.size / least.size).median()) < 1.05


# --- scale, radius, warm start ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """The same net in other units of inputs and logits."""

    def __init__(self, net: nn.Module, unit: float, loud: float) -> None:
        super().__init__()
        self.net, self.unit, self.loud = net, unit, loud

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / self.unit) * self.loud


@pytest.mark.parametrize(("unit", "loud"), [(2.0**20, 1.0), (2.0**-20, 2.0**10), (1.0, 2.0**-60)], ids=str)
@each_case
def test_neither_units_nor_logits_matter(attack: object, norm: str, slack: float, unit: float, loud: float) -> None:
    small = type(attack)(steps=20)
    if isinstance(small, DDN):
        small = DDN(steps=20, objective=margin)  # the weights that cross-entropy gives the classes depend on the scale
    net, x = relu_net((12,)).double(), inputs(8, 12, dtype=torch.float64)
    y = net(x).argmax(1)
    one = mohs.attack(small, net, x, y, f"{norm}:inf")
    threat = Threat(Threat.parse(f"{norm}:inf").region, box=(0, unit))
    other = mohs.attack(small, Scaled(net, unit, loud), x * unit, y, threat)
    assert one.success.any()
    same = (other.size / unit - one.size).abs() <= 0.02 * one.size
    assert float((same | ~one.success).double().mean()) > 0.9


@each_attack
def test_a_finite_radius_is_kept_and_used(attack: object) -> None:
    norm = "l2" if "l2" in attack.norms else attack.norms[-1]
    attack = type(attack)(steps=60)
    net, x = relu_net((20,)), inputs(48, 20)
    y = net(x).argmax(1)
    free = mohs.attack(attack, net, x, y, f"{norm}:inf")
    eps = float(free.size.median())
    out = mohs.attack(attack, net, x, y, f"{norm}:{eps}")
    assert bool((out.size[out.success] <= eps * (1 + 1e-5)).all())
    assert int(out.success.sum()) >= 22  # and perhaps more: it need not look for smaller ones
    assert int(out.forwards[out.success].sum()) < int(free.forwards[out.success].sum())


@each_attack
def test_a_warm_start_is_looked_at_first(attack: object) -> None:
    norm = "l2"
    net, x = relu_net((20,)), inputs(16, 20)
    y = net(x).argmax(1)
    good = mohs.attack(DeepFool(), net, x, y, f"{norm}:inf")
    x, y, start = x[good.success], y[good.success], good.x[good.success]
    again = mohs.attack(type(attack)(steps=1), net, x, y, f"{norm}:inf", start=start)
    assert bool((again.size <= good.size[good.success]).all())


# --- bugs of public libraries ----------------------------------------------------------------------------------------


def test_the_l2_ball_holds_and_does_not_push_out() -> None:
    # in one library the projection is the identity, in another every change is pushed out to the sphere
    region, x0 = mohs.L2(math.inf), torch.zeros(2, 4)
    change = torch.tensor([[2.0, 0, 0, 0], [0.5, 0, 0, 0]])
    back = region.project(change, x0, torch.tensor([0.5, 2.0]), (-math.inf, math.inf))
    torch.testing.assert_close(back.norm(dim=1), torch.tensor([0.5, 0.5]))
    net, x = relu_net((20,)), inputs(48, 20)
    y = net(x).argmax(1)
    fmn, ddn = (mohs.attack(a, net, x, y, "l2:inf") for a in (FMN(), DDN()))
    assert float(fmn.size.median()) < 1.05 * float(ddn.size.median())


def test_the_last_points_lie_at_the_boundary() -> None:
    # a radius that always moves by five percent leaves some of it
    net, x = relu_net((20,)), inputs(32, 20)
    y = net(x).argmax(1)
    for attack in (DDN(), FMN()):
        out = mohs.attack(attack, net, x, y, "l2:inf")
        shorter = x + 0.98 * (out.x - x)
        assert float((net(shorter).argmax(1) == y)[out.success].double().mean()) > 0.9


# --- parts -----------------------------------------------------------------------------------------------------------


def problem(norm: str, x0: Tensor) -> Problem:
    rows = len(x0)
    zero = torch.zeros(rows, dtype=torch.int64)
    threat = Threat.parse(f"{norm}:inf")
    eps = x0.new_full((rows,), math.inf)
    return Problem(Target(nn.Identity()), threat, x0, eps, Goal.leave(zero), zero, zero, zero, zero, Findings.none(x0))


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_the_proximal_point_is_the_minimum(norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(6, 10, generator=g, dtype=torch.float64)
    h = torch.rand(6, 10, generator=g, dtype=torch.float64) + 0.5
    weight = torch.tensor([[0.0], [0.1], [0.5], [1.0], [2.0], [50.0]], dtype=torch.float64)
    task = problem(norm, torch.zeros_like(v))
    region = task.threat.region

    def cost(z: Tensor) -> Tensor:
        return weight.squeeze(1) * region.measure(z, torch.zeros_like(z)) + (h * (z - v).square()).sum(1) / 2

    z = proximal(task, v, h, weight)
    least = cost(z)
    assert torch.equal(z[0], v[0])
    assert float(z[5].abs().max()) < 1e-3 if norm != "l2" else float(z[5].norm()) < 0.1 * float(v[5].norm())
    slack = 1e-2 if norm == "l2" else 1e-9  # the root in L2 is found by five iterations
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            other = z + size * torch.randn(z.shape, generator=g, dtype=torch.float64)
            assert bool((cost(other) >= least - slack).all())


def test_rows_of_superdeepfool_end_by_themselves() -> None:
    net, x = relu_net((20,)), inputs(32, 20)
    y = net(x).argmax(1)
    out = mohs.attack(SuperDeepFool(steps=300), net, x, y, "l2:inf")
    assert out.success.all()
    assert int(out.forwards.max()) < 150
    one = mohs.attack(DeepFool(polish=0), net, x, y, "l2:inf")
    assert float((out.size / one.size).mean()) < 0.99
    assert float((out.size / one.size).max()) < 1.1


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (DDN, {"steps": 0}),
        (DDN, {"gamma": -1}),
        (FMN, {"alpha": math.nan}),
        (PDGD, {"ratio": 0}),
        (PDPGD, {"dual_size": "a"}),
        (ALMA, {"alpha": 1.0}),
        (ALMA, {"check": 0}),
        (SuperDeepFool, {"damping": 1.5}),
        (SuperDeepFool, {"overshoot": -0.1}),
        (TrustRegion, {"factor": 1.0}),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(kind: type, bad: dict) -> None:
    with pytest.raises(UsageError, match=f"{kind.__name__}'s {next(iter(bad))}"):
        kind(**bad)


@each_attack
def test_other_norms_are_refused(attack: object) -> None:
    missing = {"l0", "l1", "l2", "linf"} - set(attack.norms)
    net, x = relu_net((6,)), inputs(2, 6)
    for norm in sorted(missing):
        with pytest.raises(ThreatError, match=type(attack).__name__):
            mohs.attack(attack, net, x, net(x).argmax(1), f"{norm}:inf")
