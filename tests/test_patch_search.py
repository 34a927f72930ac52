"""PatchSearch: its moves keep inside, and it finds what a linear model's best patch is."""

from __future__ import annotations

import pytest
import torch
from core_models import Linear, inputs

import mohs
from mohs.attacks import PatchSearch, patch_search
from mohs.errors import ThreatError


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
