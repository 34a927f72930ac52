"""From the same start, Mohs's FGSM and PGD find what foolbox's find: the same rows, and for one step the same points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mohs
from benchmarks import peers
from mohs.attacks import FGSM, PGD

pytestmark = pytest.mark.filterwarnings("default")

ROWS, STEPS = 120, 8
ROUNDING = 1e-4  # logits: a row that is nearer to the boundary may fall on either side of it


@pytest.fixture(scope="module")
def foolbox() -> Any:
    reason = peers.missing("foolbox")
    if reason is not None:
        pytest.skip(reason)
    return peers._load("foolbox").attacks


@pytest.fixture(scope="module")
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(11)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)
    ).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 3
    # further from the box than any eps below: where the box binds the two may project to different points
    x = 0.2 + 0.6 * torch.rand(ROWS, 1, 8, 8, generator=draw)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def leads(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """By how many logits another class is ahead of the label."""
    with torch.no_grad():
        logits = model(x)
    own = logits.gather(1, y[:, None])
    return (logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - own).squeeze(1)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y, reduction="none")


def check_same_rows(ours: Tensor, lead: Tensor) -> None:
    differing = (ours != (lead > 0)).nonzero().flatten().tolist()
    apart = {row: float(lead[row]) for row in differing if abs(float(lead[row])) > ROUNDING}
    assert not apart, f"rows that differ by more than rounding, with the peer's lead in logits: {apart}"
    assert len(differing) <= ROWS // 20, f"rows within rounding of the boundary: {differing}"


@pytest.mark.parametrize("eps", [0.02, 0.05])
def test_fgsm_finds_the_same_points(foolbox: Any, problem: tuple[nn.Module, Tensor, Tensor], eps: float) -> None:
    model, x, y = problem
    out = mohs.attack(FGSM(), model, x, y, f"linf:{eps}")
    theirs = peers.run_foolbox(foolbox.FGSM(random_start=False), model, x, y, eps, 0)
    assert 0 < out.success.sum() < ROWS  # otherwise the flags compare nothing
    check_same_rows(out.success, leads(model, theirs, y))
    assert torch.allclose(out.x[out.success], theirs[out.success], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.15)])
def test_pgd_walks_the_same_way_and_breaks_the_same_rows(
    foolbox: Any, problem: tuple[nn.Module, Tensor, Tensor], norm: str, eps: float
) -> None:
    model, x, y = problem
    kind = {"linf": foolbox.LinfPGD, "l2": foolbox.L2PGD}[norm]
    step_size = eps / 3
    pgd = PGD(STEPS, step_size, random_start=False)
    out = mohs.attack(pgd, model, x, y, f"{norm}:{eps}")
    trace = mohs.attack(pgd, model, x, y, f"{norm}:{eps}", trace=True).trace
    assert trace is not None
    # the peer shows its last iterate only; without a random start a shorter run shows an earlier one
    best, losses = leads(model, x, y), [loss(model, x, y)]
    for steps in range(1, STEPS + 1):
        attack = kind(abs_stepsize=step_size, steps=steps, random_start=False)
        theirs = peers.run_foolbox(attack, model, x, y, eps, 0)
        losses.append(loss(model, theirs, y))
        best = torch.maximum(best, leads(model, theirs, y))
    assert 0 < out.success.sum() < ROWS
    check_same_rows(out.success, best)  # Mohs keeps a row as soon as any iterate is a success
    apart = (trace[:, 0] - torch.stack(losses, 1)).abs().amax(1)
    # the sign of a derivative that is zero but for rounding may differ, and with it the rest of the row's way
    assert (apart > ROUNDING).sum() <= ROWS // 20, f"loss apart by up to {apart.max():.1e}"
