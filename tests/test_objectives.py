"""Objectives: the hand-written cotangents against autograd, and what they do where floats run out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mohs import Goal
from mohs.objectives import Objective, cross_entropy, from_loss, margin, plain_cross_entropy

OBJECTIVES = [cross_entropy, plain_cross_entropy, margin]


def goals(rows: int, classes: int, seed: int = 0) -> dict[str, Goal]:
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (rows,), generator=g)
    aim = (label + torch.randint(1, classes, (rows,), generator=g)) % classes
    return {"leave": Goal.leave(label), "attain": Goal.attain(label), "aim": Goal.leave(label, aim=aim)}


def logits(rows: int, classes: int, scale: float = 3.0, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, generator=g, dtype=torch.float64)


def written_out(objective: Objective, z: Tensor, goal: Goal) -> Tensor:
    """The definition, for autograd."""
    if objective is margin:
        rows = range(len(z))
        up, down = goal.contest(z.detach())
        return z[rows, up] - z[rows, down]
    return F.cross_entropy(z, goal.pivot, reduction="none") * goal.sign


@pytest.mark.parametrize("kind", ["leave", "attain", "aim"])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_value_and_direction_are_those_of_autograd(objective: Objective, classes: int, kind: str) -> None:
    z, goal = logits(50, classes).requires_grad_(True), goals(50, classes)[kind]
    want = written_out(objective, z, goal)
    (slope,) = torch.autograd.grad(want.sum(), z)
    value, cotangent = objective(z.detach(), goal)
    torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=1e-14)
    # parallel up to a positive factor per row
    torch.testing.assert_close(F.normalize(cotangent, dim=1), F.normalize(slope, dim=1), rtol=1e-9, atol=1e-12)
    assert value.dtype == cotangent.dtype == torch.float64
    if objective is not cross_entropy:
        torch.testing.assert_close(cotangent, slope, rtol=1e-12, atol=1e-14)


@given(shift=st.floats(-500, 500), seed=st.integers(0, 1000), classes=st.sampled_from([2, 3, 5]))
def test_adding_a_constant_to_all_logits_changes_nothing(shift: float, seed: int, classes: int) -> None:
    z = logits(6, classes, seed=seed)
    for goal in goals(6, classes, seed).values():
        for objective in OBJECTIVES:
            value, cotangent = objective(z, goal)
            moved, turned = objective(z + shift, goal)
            torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(turned, cotangent, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e30])
@pytest.mark.parametrize("kind", ["leave", "attain", "aim"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_saturated_logits_keep_a_direction(classes: int, kind: str, scale: float) -> None:
    goal = goals(20, classes)[kind]
    z = torch.zeros(20, classes).scatter_(1, goal.label.unsqueeze(1), scale if kind != "attain" else -scale)
    for objective in (cross_entropy, margin):
        value, cotangent = objective(z, goal)
        assert bool(value.isfinite().all())
        assert bool(cotangent.isfinite().all())
        length = cotangent.norm(dim=1)
        assert bool((length > 0.5).all())
        assert bool((length < 2).all())
        pushed = (cotangent.gather(1, goal.pivot.unsqueeze(1)).squeeze(1) * goal.sign) < 0
        assert bool(pushed.all())  # the label falls, or the class to reach rises
    if kind == "leave":
        assert not plain_cross_entropy(z, goal)[1].gather(1, goal.label.unsqueeze(1)).any()  # what the factor is for


def test_the_documented_example() -> None:
    value, cotangent = cross_entropy(torch.tensor([[1000.0, 0.0, 0.0]]), Goal.leave(torch.tensor([0])))
    assert value.tolist() == [0.0]
    assert cotangent.tolist() == [[-1.0, 0.5, 0.5]]


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 5]))
def test_margin_is_positive_exactly_where_the_goal_is_met(seed: int, classes: int) -> None:
    z, both = logits(8, classes, seed=seed), goals(8, classes, seed)
    for kind in ("leave", "attain"):
        assert torch.equal(margin(z, both[kind])[0], both[kind].margin(z))


def test_rows_do_not_mix() -> None:
    z, goal = logits(9, 4).float(), goals(9, 4)["leave"]
    z[4] = float("nan")
    for objective in OBJECTIVES:
        value, cotangent = objective(z, goal)
        for i in (0, 3, 5, 8):
            alone = objective(z[i : i + 1], goal.take(torch.tensor([i])))
            torch.testing.assert_close(value[i], alone[0][0])
            torch.testing.assert_close(cotangent[i], alone[1][0])
            assert bool(value[i].isfinite())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_logits_are_not_written_to(objective: Objective) -> None:
    z, goal = logits(5, 3), goals(5, 3)["aim"]
    before = z.clone()
    objective(z, goal)
    assert torch.equal(z, before)
    assert not z.requires_grad


def test_from_loss_wraps_any_differentiable_loss() -> None:
    def squared(z: Tensor, goal: Goal) -> Tensor:
        """Square of the label's logit."""
        return -z.gather(1, goal.label.unsqueeze(1)).squeeze(1).square()

    objective = from_loss(squared)
    z, goal = logits(5, 3), goals(5, 3)["leave"]
    with torch.no_grad():  # evaluation code often stands inside one
        value, cotangent = objective(z, goal)
    own = z.gather(1, goal.label.unsqueeze(1))
    torch.testing.assert_close(value, -own.squeeze(1).square())
    torch.testing.assert_close(cotangent, torch.zeros_like(z).scatter_(1, goal.label.unsqueeze(1), -2 * own))
    assert not value.requires_grad


def test_the_repr_is_the_name_because_it_goes_into_records() -> None:
    assert [repr(o) for o in OBJECTIVES] == ["cross_entropy", "plain_cross_entropy", "margin"]

    def mine(z: Tensor, goal: Goal) -> Tensor:
        return z.sum(1)

    assert repr(from_loss(mine)) == "mine"
