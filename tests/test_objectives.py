"""Objectives: the hand-written cotangents against autograd, and what they do where floats run out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mohs import Goal
from mohs.objectives import (
    Objective,
    cross_entropy,
    dlr,
    from_loss,
    margin,
    plain_cross_entropy,
    probability_margin,
)

OBJECTIVES = [cross_entropy, plain_cross_entropy, margin, dlr, probability_margin]
EXACT = [plain_cross_entropy, margin, probability_margin]
"""The others' cotangents are the derivative times a positive factor per row."""


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
    if objective is dlr:
        return ratio(z, goal)
    if objective is probability_margin:
        p, (up, down) = z.softmax(1), goal.contest(z.detach())
        v = p.gather(1, up.unsqueeze(1)) - p.gather(1, down.unsqueeze(1))
        own = p.gather(1, goal.label.unsqueeze(1))
        return torch.where(goal.reach.unsqueeze(1), own / (1 - own), (1 + v) / (1 - v)).log().squeeze(1)
    return F.cross_entropy(z, goal.pivot, reduction="none") * goal.sign


@pytest.mark.parametrize("objective", [cross_entropy, probability_margin], ids=repr)
@pytest.mark.parametrize("aimed", [False, True])
class TestRejection:
    """Classes 0 to 3 and the rejection 4."""

    def goal(self, aimed: bool) -> Goal:
        label = torch.arange(60) % 4
        return Goal.leave(label, aim=(label + 1) % 4 if aimed else None, reject=4)

    def test_the_lower_of_label_and_rejection_has_no_part(self, objective: Objective, aimed: bool) -> None:
        z, goal = logits(60, 5), self.goal(aimed)
        lower = (goal.label + 4 - goal.guard(z)).unsqueeze(1)
        value, cotangent = objective(z, goal)
        assert not bool(cotangent.gather(1, lower).any())
        assert bool((cotangent.gather(1, goal.guard(z).unsqueeze(1)) < 0).all()), "the other is to fall"
        below = z.scatter(1, lower, z.gather(1, lower) - 3)
        assert torch.equal(objective(below, goal)[0], value)

    def test_it_is_the_objective_of_a_model_without_that_logit(self, objective: Objective, aimed: bool) -> None:
        z, goal = logits(60, 5), self.goal(aimed)
        for i in range(60):
            label, guard = int(goal.label[i]), int(goal.guard(z)[i])
            kept = [k for k in range(5) if k not in {label, 4} - {guard}]
            aim = torch.tensor([kept.index(int(goal.aim[i]))]) if aimed else None
            bare = Goal.leave(torch.tensor([kept.index(guard)]), aim=aim)
            value, cotangent = objective(z[i : i + 1, kept], bare)
            assert torch.allclose(objective(z, goal)[0][i], value)
            assert torch.allclose(objective(z, goal)[1][i, kept], cotangent[0])


def ratio(z: Tensor, goal: Goal) -> Tensor:
    """Equations 6 and 7 row by row, and what is said of fewer than four classes."""
    values = []
    for row, label, reach, aim, down in zip(
        z, goal.label, goal.reach, goal.aim, goal.contest(z.detach())[1], strict=True
    ):
        first, *_, fewest = ordered = row.sort(descending=True).values
        others = torch.cat([row[:label], row[label + 1 :]])
        if reach or aim >= 0:
            gap = row[label] - row[down] if reach else row[aim] - row[label]
            enough, low = len(row) > 3, (ordered[2] + ordered[3]) / 2 if len(row) > 3 else fewest
        else:
            gap, enough, low = others.max() - row[label], len(row) > 2, ordered[2] if len(row) > 2 else fewest
        values.append(gap / (first - low) if enough else gap)
    return torch.stack(values)


@pytest.mark.parametrize("kind", ["leave", "attain", "aim"])
@pytest.mark.parametrize("classes", [2, 3, 4, 7])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_value_and_direction_are_those_of_autograd(objective: Objective, classes: int, kind: str) -> None:
    z, goal = logits(50, classes).requires_grad_(True), goals(50, classes)[kind]
    want = written_out(objective, z, goal)
    (slope,) = torch.autograd.grad(want.sum(), z)
    value, cotangent = objective(z.detach(), goal)
    # 1 + v, written out as it is defined, cancels
    torch.testing.assert_close(
        value, want.detach(), rtol=1e-8 if objective is probability_margin else 1e-12, atol=1e-14
    )
    # parallel up to a positive factor per row
    torch.testing.assert_close(F.normalize(cotangent, dim=1), F.normalize(slope, dim=1), rtol=1e-7, atol=1e-9)
    assert value.dtype == cotangent.dtype == torch.float64
    if objective in EXACT:
        torch.testing.assert_close(cotangent, slope, rtol=1e-7, atol=1e-9)


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
    for objective in OBJECTIVES:
        value, cotangent = objective(z, goal)
        assert bool(value.isfinite().all())
        assert bool(cotangent.isfinite().all())
        assert bool((cotangent.sum(1).abs() < 1e-5).all())  # a shift of all logits gains nothing
        if objective is dlr:
            assert bool((cotangent.abs().amax(1) >= 0.5).all())
        if objective in (dlr, plain_cross_entropy) or (objective is probability_margin and kind == "aim"):
            continue  # flat, or blind to a class without probability: what the others are for
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


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000), classes=st.sampled_from([3, 4, 10]))
def test_the_ratio_does_not_see_the_scale_of_the_logits(scale: float, seed: int, classes: int) -> None:
    z = logits(6, classes, seed=seed)
    for goal in goals(6, classes, seed).values():
        if classes == 3 and bool((goal.reach | (goal.aim >= 0)).any()):
            continue  # the margin
        torch.testing.assert_close(dlr(z * scale, goal), dlr(z, goal), rtol=1e-9, atol=1e-9)


@given(scale=st.floats(-30, 30), seed=st.integers(0, 1000), classes=st.sampled_from([2, 3, 10]))
def test_any_scale_gives_finite_numbers(scale: float, seed: int, classes: int) -> None:
    z = (logits(6, classes, seed=seed) * 10**scale).float()
    z[0] = z[0, 0]  # all equal
    z[1, :] = z[1].amin()
    z[1, 0] = z[1].amax() + 10**scale  # all but one
    for goal in goals(6, classes, seed).values():
        for objective in OBJECTIVES:
            value, cotangent = objective(z, goal)
            assert bool(value.isfinite().all())
            assert bool(cotangent.isfinite().all())


def test_the_probability_margin_tells_saturated_points_apart() -> None:
    # p_up - p_down itself is -1 in float32 at all three points
    z = torch.tensor([[60.0, 0.0, -9.0], [50.0, 0.0, -9.0], [40.0, 0.0, -9.0]])
    goal = Goal.leave(torch.zeros(3, dtype=torch.int64))
    p = z.softmax(1)
    assert (p[:, 1] - p[:, 0]).tolist() == [-1.0] * 3
    value, cotangent = probability_margin(z, goal)
    torch.testing.assert_close(value, z[:, 1] - z[:, 0], rtol=1e-5, atol=1e-3)
    assert bool((cotangent[:, 0] < -0.9).all())
    assert bool((cotangent[:, 1] > 0.9).all())


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 5]))
def test_all_margins_have_one_sign(seed: int, classes: int) -> None:
    z, both = logits(8, classes, seed=seed), goals(8, classes, seed)
    for kind in ("leave", "attain"):
        want = both[kind].margin(z).sign()
        assert torch.equal(dlr(z, both[kind])[0].sign(), want)
        sign = probability_margin(z, both[kind])[0].sign()
        assert bool(
            ((sign == want) | (both[kind].reach & (want > 0))).all()
        )  # reached with less than half of the probability


def test_masked_classes_leave_the_ratio_of_the_others() -> None:
    goal = Goal.leave(torch.tensor([0, 0]))
    z = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf], [3.0, 1.0, 0.0, -torch.inf]])
    value, cotangent = dlr(z, goal)
    torch.testing.assert_close(value, torch.tensor([-2.0, -2 / 3]))  # one pair: the margin
    assert cotangent[0].tolist() == [-1.0, 1.0, 0.0, 0.0]


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
    names = ["cross_entropy", "plain_cross_entropy", "margin", "dlr", "probability_margin"]
    assert [repr(o) for o in OBJECTIVES] == names

    def mine(z: Tensor, goal: Goal) -> Tensor:
        return z.sum(1)

    assert repr(from_loss(mine)) == "mine"
