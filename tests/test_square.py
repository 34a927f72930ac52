"""Square: its proposals, what a query is worth, and the places a square may take."""

from __future__ import annotations

import math

import pytest
import torch
from core_models import Linear, conv_net, inputs, relu_net

import mohs
from mohs import Access, Goal, Threat, streams
from mohs.attacks import Square, square
from mohs.errors import UsageError
from mohs.problem import Findings, Problem
from mohs.target import Target


def problem(x0: torch.Tensor, threat: str, seed: int = 0) -> Problem:
    parsed, rows = Threat.parse(threat), len(x0)
    index = torch.arange(rows)
    eps = torch.full((rows,), parsed.region.eps, dtype=x0.dtype)
    goal, target = Goal.leave(torch.zeros_like(index)), Target(torch.nn.Identity())
    key = streams.derive(index + 1, seed)
    return Problem(target, parsed, x0, eps, goal, key, index, 0 * index, 0 * index, Findings.none(x0))


def numbers(p: Problem, count: int, draw: int = 0) -> torch.Tensor:
    """Random numbers of one proposal: ``count`` and one for each channel."""
    return streams.uniform(p.key, (count + square.image(p.x0).shape[1],), draw=2 + draw)


SHAPES = [(40,), (9, 7), (3, 10, 10), (1, 28, 28), (2, 3, 5, 5)]


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.3", "l1:0.5"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_proposals_lie_in_region_and_box_and_near_the_border(shape: tuple[int, ...], threat: str) -> None:
    p = problem(0.2 + 0.6 * inputs(16, *shape), threat)
    region = p.threat.region
    best = Square().init(p).x
    for k in range(20):
        assert bool(region.contains(best, p.x0, p.eps).all())
        assert bool((best >= 0).all())
        assert bool((best <= 1).all())
        assert bool((region.measure(best, p.x0) > 0.9 * p.eps).all())
        propose, count = (square.square, 2) if threat.startswith("linf") else (square.move, 5)
        new = propose(p, best, 0.8 / 2 ** (k // 3), numbers(p, count, k))
        idle = 1 - (new != best).flatten(1).any(1).float().mean()
        assert float(idle) <= (0.5 if threat.startswith("l2") else 0), "queries for nothing"
        best = new


def test_squares_reach_every_row_and_column() -> None:
    # public code draws the offset from [0, h - s), so that the last row and column never change
    u = torch.stack([torch.linspace(0, 1 - 2**-24, 400), torch.linspace(1 - 2**-24, 0, 400)], 1)
    x = torch.zeros(400, 1, 8, 6)
    for side in (1, 3, 6):
        seen = (
            torch.zeros(400, 1, 48)
            .scatter_(2, square.pixels(square.anywhere(u, side, side, x), side, side, x), 1.0)
            .view(400, 8, 6)
        )
        assert bool((seen.sum((1, 2)) == side * side).all())
        assert bool(seen.any(0).any(1).all())
        assert bool(seen.any(0).any(0).all())
        corner = seen[:, 8 - side, :].any(1).float().mean()
        assert float(corner) > 0.5 / (9 - side)


def test_a_square_changes_nothing_outside_and_takes_the_border_inside() -> None:
    p = problem(0.3 + 0.4 * inputs(64, 3, 12, 12), "linf:0.1")
    best = Square().init(p).x
    changed = square.square(p, best, 0.25, numbers(p, 2)) != best
    rows, columns = changed.any(1).any(2), changed.any(1).any(1)
    assert bool((rows.sum(1) <= 6).all())
    assert bool((columns.sum(1) <= 6).all())
    new = square.square(p, best, 0.25, numbers(p, 2))
    torch.testing.assert_close((new - p.x0).abs(), torch.full_like(new, 0.1))
    assert bool((changed.flatten(1).sum(1) > 10).all())


def test_rows_draw_their_own_squares_and_signs() -> None:
    p = problem(torch.full((32, 1, 12, 12), 0.5), "linf:0.1")
    best = p.x0.clone()
    places = (square.square(p, best, 0.1, numbers(p, 2)) != best).flatten(1)
    assert len(places.unique(dim=0)) > 16


def test_a_warm_start_is_looked_at_as_it_is() -> None:
    net, x = conv_net(), inputs(16, 1, 12, 12)
    y = net(x).argmax(1)
    strong = mohs.attack(mohs.attacks.PGD(steps=20), net, x, y, "linf:0.05")
    again = mohs.attack(Square(steps=1), net, x, y, "linf:0.05", start=strong.x)
    assert bool(again.success[strong.success].all())
    assert bool((again.queries[strong.success] == 1).all())
    longer = mohs.attack(Square(steps=60), net, x, y, "linf:0.05", start=strong.x)
    assert bool((longer.margin[~strong.success] >= strong.margin[~strong.success]).all())


def test_the_best_corner_is_found_on_a_linear_model() -> None:
    net, x = Linear(12, 2), 0.3 + 0.4 * inputs(32, 12)
    y = net(x).argmax(1)
    eps = 0.1
    w = (net.weight[:, 1] - net.weight[:, 0]).detach()
    lead = net(x).detach().diff(dim=1).squeeze(1) * (1 - 2 * y)
    best = lead + eps * w.abs().sum()
    out = mohs.attack(Square(steps=400), net, x, y, f"linf:{eps}", stop=mohs.Stop.BUDGET)
    torch.testing.assert_close(out.margin, best, rtol=1e-3, atol=1e-4)
    assert torch.equal(out.success, best > 1e-4)


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.25", "l1:0.6"])
def test_scores_do_as_well_as_logits(threat: str) -> None:
    net, x = relu_net((12,)), inputs(64, 12)
    y = net(x).argmax(1)
    a, b = (
        mohs.attack(Square(steps=100), net, x, y, Threat(Threat.parse(threat).region, access=access))
        for access in (Access.SCORE, Access.LOGIT)
    )
    assert int((a.success != b.success).sum()) <= 1
    assert 5 < int(a.success.sum()) < 64


def test_targets_are_reached() -> None:
    net, x = relu_net((12,)), inputs(64, 12)
    targets = (net(x).argmax(1) + 1) % 4
    out = mohs.attack(Square(steps=300), net, x, net(x).argmax(1), "linf:0.4", targets=targets)
    assert int(out.success.sum()) > 20
    assert torch.equal(net(out.x).argmax(1)[out.success], targets[out.success])


@pytest.mark.parametrize("threat", ["linf", "l2", "l1"])
def test_units_do_not_matter(threat: str) -> None:
    x, unit = inputs(8, 1, 10, 10), 2.0**8
    small, large = problem(x, f"{threat}:0.5"), problem(x * unit, f"{threat}:{0.5 * unit} in [0, {unit}]")
    a, b = Square().init(small).x, Square().init(large).x
    torch.testing.assert_close(a * unit, b, rtol=1e-5, atol=1e-3)
    propose, count = (square.square, 2) if threat == "linf" else (square.move, 5)
    new, newer = propose(small, a, 0.1, numbers(small, count)), propose(large, b, 0.1, numbers(small, count))
    torch.testing.assert_close(new * unit, newer, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (1, 4), (4, 1), (1, 1), (2, 6)], ids=str)
def test_bumps_have_unit_length_and_two_signs(size: tuple[int, int], p: float) -> None:
    both = square.pattern(*size, p, torch.zeros(1))
    assert both.shape == (2, *size)
    torch.testing.assert_close(torch.linalg.vector_norm(both, p, dim=(1, 2)), torch.ones(2))
    if math.prod(size) > 1:
        assert bool((both.amin((1, 2)) < 0).all())
        assert bool((both.amax((1, 2)) > 0).all())


def test_the_area_falls_as_published() -> None:
    assert [square.sides(0.8, torch.zeros(1, 1, 28, 28)), square.sides(0.8 / 256, torch.zeros(1, 1, 28, 28))] == [
        (25, 25),
        (2, 2),
    ]
    assert square.sides(0.5, torch.zeros(1, 1, 1, 40)) == (1, 20)
    assert square.sides(0.5, torch.zeros(1, 1, 40, 2)) == (20, 2)


def test_the_schedule_is_the_papers_over_ten_thousand_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, areas = conv_net(), inputs(2, 1, 12, 12), []
    p = problem(x, "linf:0.1")
    p.target.model = p.target.guide = net
    monkeypatch.setattr(square, "square", lambda problem, best, area, k: areas.append(area) or best)
    attack = Square(steps=1000)
    state = attack.init(p)
    for k in (0, 1, 2, 5, 6, 20, 21, 51, 101, 201, 401, 601, 801, 999):
        state = attack.step(p, state, k)
    halvings = [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert areas == [0.8 / 2**n for n in halvings]


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.3", "l1:0.5"])
def test_every_channel_has_its_own_sign(threat: str) -> None:
    p = problem(0.3 + 0.4 * inputs(32, 3, 12, 12), threat)
    propose, count = (square.square, 2) if threat.startswith("linf") else (square.move, 5)
    best = Square().init(p).x
    a = propose(p, best, 0.1, numbers(p, count))
    rise = ((a - p.x0) * (a != best)).flatten(2).sum(2).sign()
    mixed = (rise.amax(1) > 0) & (rise.amin(1) < 0)
    assert float(mixed.float().mean()) > 0.4  # three signs are equal a quarter of the time


def test_every_step_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, seen, propose = conv_net(), inputs(8, 1, 12, 12), [], square.square
    monkeypatch.setattr(square, "square", lambda p, best, area, u: seen.append(u.clone()) or propose(p, best, area, u))
    mohs.attack(Square(steps=70), net, x, net(x).argmax(1), "linf:0.001", batch=8)  # two blocks and a part of one
    drawn = torch.stack(seen)
    assert drawn.shape == (70, 8, 3)
    assert len(drawn.flatten().unique()) == drawn.numel()


def test_stripes_are_columns_of_their_own() -> None:
    p = problem(0.3 + 0.4 * inputs(16, 3, 10, 10), "linf:0.1")
    change = Square().init(p).x - p.x0
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.1))
    up = change > 0
    assert torch.equal(up, up[:, :, :1].expand_as(up))
    assert bool((up[:, :, 0].any(2) & ~up[:, :, 0].all(2)).float().mean() > 0.9)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_a_bump_is_made_of_nested_rectangles(p: float) -> None:
    # equation 2 for a side of five: heights 1 + 1/4 + 1/9 in the middle, 1/4 + 1/9 around it, 1/9 at the border
    power = 2 if p > 1 else 4
    heights = torch.tensor([sum(n**-power for n in range(k, 4)) for k in (1, 2, 3)], dtype=torch.float64)
    row = torch.tensor([2, 1, 0, 1, 2])
    torch.testing.assert_close(square._bump(5, 5, p), heights[torch.maximum(row.unsqueeze(1), row.unsqueeze(0))])


def test_moves_spend_what_two_windows_hold_and_what_was_free() -> None:
    # the second window is emptied, and its mass goes to the first: the 2-norm stays, and the change gathers
    p = problem(torch.full((64, 1, 12, 12), 0.5), "l2:0.3")
    best = Square().init(p).x
    p.eps = torch.full_like(p.eps, 0.3)
    new = square.move(p, best, 0.05, numbers(p, 5))
    moved = (new != best).flatten(1)
    emptied = moved & ((new - p.x0).flatten(1) == 0)
    assert bool(moved.any(1).all())
    assert float(emptied.any(1).float().mean()) > 0.8
    torch.testing.assert_close((new - p.x0).flatten(1).norm(dim=1), p.eps, rtol=1e-4, atol=0)
    # outside of the windows nothing moves, so nothing was scaled to fill the radius
    assert bool((moved.sum(1) <= 2 * 9).all())


@pytest.mark.parametrize("bad", [{"steps": 0}, {"share": 0.0}, {"share": 1.5}, {"objective": "margin"}], ids=str)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        Square(**bad)
