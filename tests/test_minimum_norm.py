"""The ensemble of minimum-norm attacks: exact on linear models, no worse than its parts, one curve from one run."""

from __future__ import annotations

import math

import pytest
import torch
from core_models import conv_net, inputs
from torch import nn

import mohs
from mohs.errors import ThreatError, UsageError
from mohs.evaluation.distance import ENSEMBLE, Distances, minimum_norm
from mohs.regions import Linf, Lp


def linear(classes: int = 3, inputs: int = 8) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    net = nn.Linear(inputs, classes).eval()
    with torch.no_grad():
        net.weight.copy_(torch.randn(classes, inputs, generator=draw))
        net.bias.copy_(torch.randn(classes, generator=draw))
    return net


@pytest.mark.parametrize(("form", "p"), [("linf", math.inf), ("l2", 2.0), ("l1", 1.0), ("l3", 3.0)])
def test_close_to_the_exact_distance_of_a_linear_model(form: str, p: float) -> None:
    net, x = linear(), inputs(40, 8) * 4 - 2
    z = net(x).detach()
    y = z.argmax(1)
    q = math.inf if p == 1 else p / (p - 1) if p != math.inf else 1.0
    exact = torch.full((40,), math.inf)
    for c in range(3):
        weight = net.get_parameter("weight")
        w = weight[c] - weight[y]
        gap = z.gather(1, y.unsqueeze(1)).squeeze(1) - z[:, c]
        distance = gap / torch.linalg.vector_norm(w.detach(), q, dim=1)
        exact = torch.where(y == c, exact, torch.minimum(exact, distance))
    region = Linf(math.inf) if p == math.inf else {1.0: mohs.L1, 2.0: mohs.L2}.get(p, lambda e: Lp(p, e))(math.inf)
    found = minimum_norm(net, x, y, mohs.Threat(region, box=(-math.inf, math.inf)), passes=400)
    ratio = found.size / exact
    assert bool((ratio >= 1 - 1e-5).all()), "smaller than the exact distance"
    assert float(ratio.median()) < 1.02
    assert float(ratio.max()) < 1.15


def test_no_worse_than_the_first_leg_and_never_beyond_the_budget() -> None:
    net, x = conv_net(), inputs(24, 1, 12, 12)
    y = net(x).argmax(1)
    found = minimum_norm(net, x, y, "l2", passes=200, batch=32)
    first = ENSEMBLE["l2"][0]
    alone = mohs.attack(first.make(first.steps(200)), net, x, y, "l2:inf", batch=32)
    assert bool((found.size <= alone.size).all())
    assert bool((found.forwards + found.backwards <= 200).all())
    assert bool((found.forwards > 0).all())
    torch.testing.assert_close(found.size, (found.x - x).flatten(1).norm(dim=1))
    assert bool((net(found.x).argmax(1) != y)[found.success].all())
    assert set(found.by) <= {"SuperDeepFool", "PDGD", "DDN", ""}


@pytest.mark.parametrize("form", ["linf", "l2", "l1", "l0-features"])
@pytest.mark.parametrize("passes", [13, 50, 137])
def test_any_budget_is_kept_and_nearly_all_of_it_used(form: str, passes: int) -> None:
    net, x = conv_net(), inputs(12, 1, 12, 12)
    y = net(x).argmax(1)
    found = minimum_norm(net, x, y, form, passes=passes, batch=16)
    spent = found.forwards + found.backwards
    assert bool((spent <= passes).all())
    if (
        form != "l0-features" and passes > 100
    ):  # few passes are one leg's, which may end by itself; in L0 one position may suffice
        assert bool((spent >= 0.8 * passes - 3).all())


def test_a_row_does_not_depend_on_its_mates() -> None:
    net, x = conv_net(), inputs(24, 1, 12, 12)
    y = net(x).argmax(1)
    whole = minimum_norm(net, x, y, "linf", passes=120, batch=16)
    part = minimum_norm(net, x[7:15], y[7:15], "linf", passes=120, batch=16)
    assert torch.equal(whole.x[7:15], part.x)
    assert torch.equal(whole.forwards[7:15], part.forwards)
    assert whole.by[7:15] == part.by


def test_who_is_wrong_from_the_start_costs_one_leg() -> None:
    net, x = conv_net(), inputs(12, 1, 12, 12)
    y = (net(x).argmax(1) + 1) % 5
    found = minimum_norm(net, x, y, "linf", passes=400)
    assert bool((found.size == 0).all())
    assert int((found.forwards + found.backwards).max()) < 20


@pytest.mark.parametrize("budget", [50, 200])
def test_progress_counts_every_leg_to_its_end(budget: int) -> None:
    net, x = conv_net(), inputs(12, 1, 12, 12)
    seen: dict[str, list[int]] = {}
    minimum_norm(
        net,
        x,
        net(x).argmax(1),
        "l1",
        passes=budget,
        progress=lambda name, done, of: seen.setdefault(name, []).append(done),
    )
    assert next(iter(seen)) == "SuperDeepFool"
    assert all(done == sorted(done) and done[-1] == 12 for done in seen.values())


def test_the_curve_falls_at_the_sizes() -> None:
    found = Distances(
        torch.zeros(4, 1), torch.tensor([0.0, 0.2, 0.2, math.inf]), [""] * 4, torch.zeros(4), torch.zeros(4)
    )
    radii, accuracy = found.curve()
    torch.testing.assert_close(radii, torch.tensor([0.0, 0.2]))
    torch.testing.assert_close(accuracy, torch.tensor([0.75, 0.25]))
    assert float(found.accuracy(0.1)) == 0.75
    assert found.success.tolist() == [True, True, True, False]


def test_targets_are_reached() -> None:
    net, x = conv_net(), inputs(12, 1, 12, 12)
    y = net(x).argmax(1)
    targets = (y + 1) % 5
    found = minimum_norm(net, x, y, "linf", passes=200, targets=targets)
    assert int(found.success.sum()) > 6
    assert bool((net(found.x).argmax(1) == targets)[found.success].all())


def test_refusals() -> None:
    net, x = linear(), inputs(3, 8)
    y = net(x).argmax(1)
    with pytest.raises(ThreatError, match="l2:inf"):
        minimum_norm(net, x, y, "l2:0.5")
    with pytest.raises(UsageError, match="passes"):
        minimum_norm(net, x, y, "l2:inf", passes=2)
