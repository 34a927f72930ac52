"""The Boundary attack: where the truth is known, and step by step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_models import Linear, inputs
from torch import Tensor

import mohs
from mohs.attacks import Boundary, Job
from mohs.attacks.boundary import SPHERE, STEP, BoundaryState
from mohs.errors import UsageError


def state(n: int = 1, **values: object) -> BoundaryState:
    zero, x = torch.zeros(n), torch.zeros(n, 2)
    base = BoundaryState(
        x=x, phase=torch.zeros(n, dtype=torch.int64), kept=x, far=zero, low=zero, high=zero,
        turn=torch.zeros(n, dtype=torch.int64), planned=x, side=zero + 0.1, inwards=zero + 0.2, looks=torch.zeros(n, 2),
        wins=torch.zeros(n, 2),
    )  # fmt: skip
    return replace(base, **values)


def test_it_comes_to_the_nearest_point_of_a_linear_boundary() -> None:
    net, x = Linear(8, 2, dtype=torch.float64), inputs(16, 8, dtype=torch.float64)
    y = net(x).argmax(1)
    w = (net.weight[:, 1] - net.weight[:, 0]).detach()
    exact = (net(x)[:, 1] - net(x)[:, 0]).detach().abs() / w.norm()
    found = mohs.attack(Boundary(steps=1500), net, x, y, "l2:inf in [-inf, inf]")
    ratio = found.size / exact
    assert bool(found.success.all())
    assert bool((ratio >= 1 - 1e-9).all())
    assert float(ratio.median()) < 1.01
    assert float(ratio.max()) < 1.05


def test_it_keeps_to_the_box_and_ends_inside_a_radius() -> None:
    net, x = Linear(8, 3), inputs(16, 8)
    y = net(x).argmax(1)
    free = mohs.attack(Boundary(steps=800), net, x, y, "l2:inf")
    assert bool(free.success.all())
    assert float(free.x.min()) >= 0.0
    assert float(free.x.max()) <= 1.0
    within = mohs.attack(Boundary(steps=800), net, x, y, "l2:1", eps=2 * free.size)
    assert bool(within.success.all())
    assert bool((within.size <= 2 * free.size + 1e-6).all())
    assert bool((within.forwards < free.forwards).all())


def walk(steps: int, box: str) -> list[BoundaryState]:
    """The states of eight rows, step by step."""
    net, x = Linear(6, 2, dtype=torch.float64), inputs(8, 6, dtype=torch.float64).round()  # corners of the box
    seen: list[BoundaryState] = []

    class Told(Boundary):
        def step(self, problem: mohs.problem.Problem, s: BoundaryState, k: int) -> BoundaryState:
            seen.append(replace(s))
            return super().step(problem, s, k)

    threat = mohs.Threat.parse(f"l2:inf in {box}")
    for _ in Job(Told(steps=steps), net, x, net(x).argmax(1), threat, seed=0, batch=8).run():
        pass
    return seen


def test_steps_to_the_side_keep_the_distance_and_steps_inwards_shorten_it() -> None:
    seen = walk(120, "[-inf, inf]")
    x0: Tensor = seen[0].x
    kinds = {SPHERE: 0, STEP: 0}
    for s in seen:
        d = (s.x - x0).norm(dim=1)
        for kind, shorter in ((SPHERE, 0.0), (STEP, 1.0)):
            at = s.phase == kind
            kinds[kind] += int(at.sum())
            assert torch.allclose(d[at], (s.far * (1 - shorter * s.inwards))[at], rtol=1e-9)
        at = s.phase == SPHERE
        chord = 2 * s.far * torch.sin(torch.atan(s.side) / 2)
        assert torch.allclose((s.x - s.kept).norm(dim=1)[at], chord[at], rtol=1e-6)
    assert kinds[STEP] > 5 * kinds[SPHERE] > 0
    far = torch.stack([s.far for s in seen if bool((s.phase >= SPHERE).all())])
    assert bool((far[1:] <= far[:-1]).all())


def test_what_the_box_takes_of_the_distance_is_not_taken_again() -> None:
    seen = walk(200, "[0, 1]")
    x0: Tensor = seen[0].x
    cut, exact, steps = 0, 0, 0
    for s in seen:
        d = (s.x - x0).norm(dim=1)
        cut += int(((s.phase == SPHERE) & (d < (1 - 1e-7) * s.far)).sum())
        at = s.phase == STEP
        steps += int(at.sum())
        wanted = s.far * (1 - s.inwards)
        assert bool((d[at] <= wanted[at] * (1 + 1e-9)).all())
        exact += int((at & (d > wanted * (1 - 1e-9))).sum())
    assert cut > 0
    assert exact == steps > 0


@pytest.mark.parametrize(
    ("kind", "wins", "looks", "factor"),
    [
        (0, 6, 10, 1.5), (0, 5, 10, 1.0), (0, 2, 10, 1.0), (0, 1, 10, 1 / 1.5), (0, 9, 9, 1.0),
        (1, 8, 30, 1.5), (1, 7, 30, 1.0), (1, 3, 30, 1.0), (1, 2, 30, 1 / 1.5), (1, 29, 29, 1.0),
    ],
)  # fmt: skip
def test_lengths_follow_the_share_of_wrong_answers(kind: int, wins: int, looks: int, factor: float) -> None:
    counts = torch.zeros(2, 1, 2)
    counts[0, 0, kind], counts[1, 0, kind] = looks - 1, wins - 1
    kinds = torch.zeros(1, 2, dtype=torch.bool)
    kinds[0, kind] = True
    s = Boundary._counted(state(looks=counts[0], wins=counts[1]), torch.tensor([True]), kinds)
    length = (s.side, s.inwards)[kind]
    assert float(length) == pytest.approx((0.1, 0.2)[kind] * factor)
    cleared = looks >= (10, 30)[kind]
    assert float(s.looks[0, kind]) == (0 if cleared else looks)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"side": 0.0}, {"inwards": math.inf}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="Boundary's"):
        Boundary(**wrong)


def test_a_confidence_is_refused() -> None:
    net, x = Linear(4, 2), inputs(2, 4)
    with pytest.raises(UsageError, match="Boundary sees answers alone"):
        mohs.attack(Boundary(steps=5), net, x, net(x).argmax(1), "l2:inf", confidence=1.0)
