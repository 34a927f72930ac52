"""PatchSearch: its moves keep inside, and it finds what a linear model's best patch is."""

from __future__ import annotations

import math

import pytest
import torch
from core_models import Linear, inputs
from torch import Tensor

import mohs
from mohs.attacks import PatchSearch, patch_search
from mohs.errors import ThreatError
from mohs.objectives import cross_entropy, margin


def test_the_best_patch_of_a_linear_model_is_approached() -> None:
    net, x = Linear(36, 2), inputs(8, 1, 6, 6)
    y = net(x).argmax(1)
    region = mohs.Patch(2)
    sign = (1 - 2 * y).float().view(-1, 1, 1, 1)
    g = (net.weight[:, 1] - net.weight[:, 0]).detach().view(1, 1, 6, 6) * sign
    eps = torch.full((8,), 2.0)
    best = region.extreme(g.expand_as(x), x, eps, (0.0, 1.0))

    def lead(points: torch.Tensor) -> torch.Tensor:
        return net(points).detach().diff(dim=1).squeeze(1) * sign.flatten()

    out = mohs.attack(PatchSearch(steps=300), net, x, y, "patch:2", restarts=4, stop=mohs.Stop.BUDGET)
    gained = (out.margin - lead(x)) / (lead(best) - lead(x))
    assert float(gained.max()) <= 1 + 1e-5, "more than the best patch gains"
    assert float(gained.median()) > 0.9, gained
    assert bool(region.contains(out.x, x, eps).all())
    fixed = mohs.attack(PatchSearch(steps=60), net, x, y, mohs.Threat(mohs.Patch(2, at=(3, 4))), stop=mohs.Stop.BUDGET)
    rows, columns = ((fixed.x != x).any(1).any(axis).any(0).nonzero().flatten().tolist() for axis in (2, 1))
    assert set(rows) <= {3, 4}
    assert set(columns) <= {4, 5}


def test_a_start_is_looked_at_as_it_is() -> None:
    net, x = Linear(36, 2), inputs(8, 1, 6, 6)
    y = net(x).argmax(1)
    for threat in ("patch:3", "patch@2,1:3"):
        strong = mohs.attack(mohs.attacks.LaVAN(), net, x, y, threat)
        assert bool(strong.success.any())
        again = mohs.attack(PatchSearch(steps=1), net, x, y, threat, start=strong.x)
        assert bool((again.queries[strong.success] == 1).all())
        assert torch.equal(again.x[strong.success], strong.x[strong.success])


@pytest.mark.parametrize(
    ("box", "dtype"), [((-2.1179, 2.64), torch.float32), ((0.0, 0.3), torch.float64), ((-0.1, 0.3), torch.float32)]
)
def test_no_look_leaves_a_box_whose_bounds_are_not_exact(box: tuple[float, float], dtype: torch.dtype) -> None:
    low, high = torch.tensor(box, dtype=dtype)
    net, x = Linear(108, 3, dtype=dtype), (low + (high - low) * inputs(8, 3, 6, 6, dtype=dtype)).clamp(low, high)
    seen: list[torch.Tensor] = []

    class Noted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach().clone())
            return net(x)

    y, threat = net(x).argmax(1), mohs.Threat(mohs.Patch(3), box=box)
    out = mohs.attack(PatchSearch(steps=150), Noted(), x, y, threat, stop=mohs.Stop.BUDGET)
    looks = torch.stack(seen)
    assert bool(((looks >= low) & (looks <= high)).all())
    assert bool((out.x != x).flatten(1).any(1).all()), "every row improves on the clean input"
    assert bool(((looks == low) | (looks == high)).any(0).flatten(1).any(1).all())


def test_images_are_moved_around() -> None:
    x = torch.arange(24.0).view(2, 1, 3, 4)
    by = torch.tensor([[1, 2], [-1, 0]])
    found = patch_search.moved(x, by)
    assert torch.equal(found[0], x[0].roll((1, 2), (1, 2)))
    assert torch.equal(found[1], x[1].roll((-1, 0), (1, 2)))


def test_other_regions_are_refused() -> None:
    with pytest.raises(ThreatError, match="patch"):
        mohs.attack(PatchSearch(), Linear(4, 2), inputs(2, 4), torch.zeros(2, dtype=torch.int64), "linf:0.1")


LATE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After how many of 10,000 steps the squares lose half of their area."""


def windows(x: Tensor, x0: Tensor, side: int) -> list[tuple[int, int]]:
    """First pixel of each row's patch, which covers a whole square of the image."""
    found = []
    for changed in (x != x0).any(1):
        rows, columns = (changed.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        assert int(changed.sum()) == side * side == len(rows) * len(columns), changed.int()
        found.append((rows[0], columns[0]))
    return found


@pytest.mark.parametrize("objective", [margin, cross_entropy], ids=["margin", "cross-entropy"])
@pytest.mark.parametrize("at", [None, (3, 4)], ids=["anywhere", "at one place"])
def test_every_proposal_is_one_change_of_the_best_look_so_far(at: tuple[int, int] | None, objective: object) -> None:
    steps, side, share, count, (height, width) = 45, 6, 0.9, 24, (14, 12)
    net = Linear(2 * height * width, 3, dtype=torch.float64)
    x0 = 0.2 + 0.6 * inputs(
        count, 2, height, width, dtype=torch.float64
    )  # so that the patch, 0 or 1, is seen as a whole
    y, seen = net(x0).argmax(1), list[Tensor]()

    class Noted(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return net(x)

    attack, threat = PatchSearch(steps=steps, share=share, objective=objective), mohs.Threat(mohs.Patch(side, at=at))
    out = mohs.attack(attack, Noted(), x0, y, threat, batch=count, stop=mohs.Stop.BUDGET)
    assert len(seen) == steps + 1
    assert out.queries.tolist() == [steps + 1] * count
    logits = torch.stack([net(x).detach() for x in seen])
    own = logits.gather(2, y.view(1, -1, 1).expand(steps + 1, -1, 1)).squeeze(2)
    others = logits.scatter(2, y.view(1, -1, 1).expand(steps + 1, -1, 1), -torch.inf)
    value = others.amax(2) - own if objective is margin else logits.logsumexp(2) - own
    places = [windows(x, x0, side) for x in seen]
    patches = [
        torch.stack([x[i, :, a : a + side, b : b + side] for i, (a, b) in enumerate(place)])
        for x, place in zip(seen, places, strict=True)
    ]
    free = (height - side, width - side)
    assert bool((patches[0] == patches[0][:, :, :1]).all()), "vertical stripes"
    assert 0.4 < float(patches[0].mean()) < 0.6
    if at is None:
        for axis in (0, 1):
            assert {place[axis] for place in places[0]} >= {0, free[axis]}, "first places reach from edge to edge"
    squares, steps_taken = [set[tuple[int, int]]() for _ in range(count)], set[tuple[int, int, bool]]()
    mixed = full = 0
    for k in range(steps):
        scale = math.sqrt(share * 0.5 ** sum(k * 10_000 // steps > late for late in LATE))
        longest, reach = max(round(side * scale), 1), [math.ceil(n * max(scale, 0.25)) for n in free]
        best = value[: k + 1].argmax(0).tolist()
        for i, b in enumerate(best):
            old, new = patches[b][i], patches[k + 1][i]
            way = [after - before for before, after in zip(places[b][i], places[k + 1][i], strict=True)]
            if at is None and k % 3 == 2:
                negative = torch.equal(new, 1 - old)
                assert negative or torch.equal(new, old)
                assert all(abs(step) <= most for step, most in zip(way, reach, strict=True))
                steps_taken |= {(0, way[0], negative), (1, way[1], negative)}
                continue
            assert way == [0, 0]
            changed = (new != old).any(0)
            assert bool(changed.any()), "a proposal that changes nothing"
            rows, columns = (changed.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            tall, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            assert max(tall, wide) <= longest
            full += tall == wide == longest
            if longest == 1:
                squares[i].add((rows[0], columns[0]))
                mixed += int(new[0, rows[0], columns[0]] != new[1, rows[0], columns[0]])
    assert full > count * steps // 3, "squares are as large as they are said to be"
    assert mixed > count, "each channel has a colour of its own"
    assert min(len(found) for found in squares) > 10, "squares lie anywhere in the patch"
    edges = [place for found in squares for place in found]
    assert {min(place) for place in edges} >= {0, side - 1}
    if at is None:
        assert steps_taken >= {
            (axis, way, negative) for axis in (0, 1) for way in (-2, 2) for negative in (True, False)
        }
    else:
        assert {place for found in places for place in found} == {at}
