"""The attack in the latent against generators and nets whose nearest boundary is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mohs
from mohs.attacks import Latent
from mohs.defenses import DefenseGAN
from mohs.errors import ModelError, ThreatError, UsageError

SIZE, LATENT, ROWS = 12, 3, 6


class Plane(nn.Module):
    """x = A z + b with orthonormal columns."""

    latent = LATENT

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.columns = nn.Parameter(torch.linalg.qr(torch.randn(SIZE, LATENT, generator=draws))[0])
        self.middle = nn.Parameter(torch.randn(SIZE, generator=draws))

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.columns.t() + self.middle


def problem() -> tuple[Plane, nn.Linear, Tensor, Tensor, Tensor]:
    """Generator, net, inputs it can make, their classes, and how far the boundary is within what it can make."""
    plane, draws = Plane(), torch.Generator().manual_seed(3)
    net = nn.Linear(SIZE, 2)
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, SIZE, generator=draws))
        net.bias.copy_(-net.weight @ plane.middle)
        x = plane(torch.randn(ROWS, LATENT, generator=draws))
        y = net(x).argmax(1)
        lead = (net(x)[:, 0] - net(x)[:, 1]).abs()
        distance = lead / ((net.weight[0] - net.weight[1]) @ plane.columns).norm()
    return plane, net.eval(), x, y, distance


OPEN = (-math.inf, math.inf)


def test_the_smallest_change_that_the_generator_can_make() -> None:
    plane, net, x, y, distance = problem()
    out = mohs.attack(Latent(plane, begin=60), net, x, y, mohs.Threat(mohs.L2(math.inf), box=OPEN))
    assert bool(out.success.all())
    ratio = out.size / distance
    assert bool((ratio > 0.999).all())  # none is smaller: it is on the plane
    assert bool((ratio < 1.03).all())
    moved = (out.x - plane.middle) @ plane.columns
    assert torch.allclose(plane(moved), out.x, atol=1e-4)


def test_a_boundary_off_the_plane_is_nearer() -> None:
    _, net, x, y, distance = problem()
    free = mohs.attack(mohs.attacks.DeepFool(), net, x, y, mohs.Threat(mohs.L2(math.inf), box=OPEN))
    assert bool((free.size < 0.9 * distance).all())


def test_a_stand_in_that_takes_its_goal_for_met_too_early() -> None:
    plane, net, x, y, distance = problem()
    early = nn.Linear(SIZE, 2).eval()
    early.load_state_dict(net.state_dict())
    with torch.no_grad():
        early.bias[0] += 1.0  # inputs of class 1 look broken a logit before they are
    rows = y == 1
    out = mohs.attack(
        Latent(plane, begin=60), net, x[rows], y[rows], mohs.Threat(mohs.L2(math.inf), box=OPEN), guide=early
    )
    assert len(out.success) == 3
    assert bool(out.success.all())
    assert bool((out.size / distance[rows] < 1.5).all())


@pytest.mark.parametrize(("share", "broken"), [(0.95, 0), (1.1, ROWS)])
def test_a_fixed_radius_suffices_just_above_the_distance(share: float, broken: int) -> None:
    plane, net, x, y, distance = problem()
    out = mohs.attack(
        Latent(plane, steps=100), net, x, y, mohs.Threat(mohs.L2(1.0), box=OPEN), eps=share * distance, restarts=2
    )
    # pulling back towards the clean input stays on the plane, as that lies on it
    assert int(out.success.sum()) == broken
    assert bool((out.size[out.success] <= share * distance[out.success] * 1.001).all())


def test_inputs_the_generator_cannot_make_are_brought_near() -> None:
    plane, net, x, y, _ = problem()
    away = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    out = mohs.attack(Latent(plane, steps=60), net, away, y, mohs.Threat(mohs.Linf(5.0), box=OPEN))
    assert bool(out.success.all())
    assert bool((out.size <= 5.0 * (1 + 1e-5)).all())


def test_boxes_hold_and_restarts_differ() -> None:
    plane, net, x, y, _ = problem()
    box = (float(x.min()), float(x.max()))
    threat = mohs.Threat(mohs.L2(math.inf), box=box)
    one = mohs.attack(Latent(plane, steps=40, begin=0), net, x, y, threat)
    three = mohs.attack(Latent(plane, steps=40, begin=0), net, x, y, threat, restarts=3)
    assert bool((one.x >= box[0]).all() and (one.x <= box[1]).all())
    assert bool((three.size <= one.size).all())
    assert bool((three.restart > 0).any())


def test_same_bits_whatever_the_order() -> None:
    plane, net, x, y, _ = problem()
    threat = mohs.Threat(mohs.L2(math.inf), box=OPEN)
    there = mohs.attack(Latent(plane, steps=30), net, x, y, threat, batch=4)
    back = mohs.attack(Latent(plane, steps=30), net, x.flip(0), y.flip(0), threat, batch=4)
    assert torch.equal(there.x, back.x.flip(0))
    assert int(there.forwards.max()) <= 31


def test_what_names_it_is_short_and_knows_the_weights() -> None:
    one, same, other = Latent(Plane()), Latent(Plane()), Latent(nn.Linear(LATENT, SIZE), size=LATENT)
    assert one == same
    assert repr(one) == repr(same) != repr(other)
    assert len(repr(one)) < 200


def test_refusals() -> None:
    _, net, x, y, _ = problem()
    with pytest.raises(UsageError, match="no attribute latent; give size"):
        Latent(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="generator must be a torch module; got function"):
        Latent(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Latent's rate must be a finite number above 0"):
        Latent(Plane(), rate=0.0)
    with pytest.raises(ModelError, match=r"makes \(\d+, 5\) where inputs are \(\d+, 12\)"):
        mohs.attack(Latent(nn.Linear(2, 5), size=2), net, x, y, mohs.Threat(mohs.L2(1.0), box=OPEN))
    with pytest.raises(ThreatError, match="Latent does not serve l0"):
        mohs.attack(Latent(Plane()), net, x, y, mohs.Threat(mohs.L0(2), box=OPEN))


@pytest.mark.parametrize(("inner", "outer"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_generator_and_inputs_of_different_precision(inner: torch.dtype, outer: torch.dtype) -> None:
    plane, net, x, y, distance = problem()
    threat = mohs.Threat(mohs.L2(math.inf), box=OPEN)
    out = mohs.attack(Latent(plane.to(inner), steps=150, begin=60), net.to(outer), x.to(outer), y, threat)
    assert out.x.dtype == outer
    assert bool(out.success.all())
    assert bool((out.size / distance < 1.05).all())


def test_a_generator_in_training_mode_is_left_as_it_is() -> None:
    made = nn.Sequential(nn.Linear(LATENT, SIZE), nn.BatchNorm1d(SIZE))
    with pytest.raises(UsageError, match=r"training mode \(1: BatchNorm1d\)"):
        Latent(made, size=LATENT)
    attack, (_, net, x, y, _) = Latent(made.eval(), size=LATENT, steps=2), problem()
    made.train()
    with pytest.raises(UsageError, match="training mode"):
        mohs.attack(attack, net, x, y, mohs.Threat(mohs.L2(1.0), box=OPEN))
    assert not bool(made[1].running_mean.any())


def test_what_it_finds_a_projection_leaves_as_it_is() -> None:
    class Small(nn.Module):
        latent = LATENT

        def __init__(self) -> None:
            super().__init__()
            self.plane = Plane()

        def forward(self, z: Tensor) -> Tensor:
            return 0.5 + 0.1 * (self.plane(z) - self.plane.middle)

    draws, small = torch.Generator().manual_seed(5), Small()
    net = nn.Linear(SIZE, 2)
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, SIZE, generator=draws))
        net.bias.copy_(-0.5 * net.weight.sum(1))
        x = small(torch.randn(ROWS, LATENT, generator=draws))
        y = net(x).argmax(1)
    defended = DefenseGAN(steps=40, starts=1, rate=300.0, seed=0, generator=small)(net.eval())
    with torch.no_grad():
        assert torch.equal(defended(x).argmax(1), y)
        away = x + 0.5 * torch.nn.functional.normalize(
            torch.randn(x.shape, generator=draws) @ normal(small.plane), dim=1
        )
        assert torch.allclose(defended(away.clamp(0, 1)), defended(x), atol=0.3)  # off the plane nothing is gained
    out = mohs.attack(Latent(small, steps=100, begin=60), defended, x, y, "l2:inf", guide=net)
    lead = (net(x)[:, 0] - net(x)[:, 1]).abs()
    distance = lead / ((net.weight[0] - net.weight[1]) @ small.plane.columns).norm()
    assert bool(out.success.all())
    assert bool((out.size / distance < 1.1).all())
    assert bool((defended(out.x).argmax(1) != y).all())


def normal(plane: Plane) -> Tensor:
    """The projection onto what is orthogonal to the plane."""
    return torch.eye(SIZE) - plane.columns @ plane.columns.t()
