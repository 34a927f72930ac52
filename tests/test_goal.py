"""Goals against brute force: the one place that knows what success is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mohs
from mohs import Goal
from mohs.attacks import PGD
from mohs.errors import ModelError, UsageError
from mohs.target import classify, rounding

logit = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e4, 1e4, width=32))


@st.composite
def cases(draw: Any) -> tuple[list[float], int, int | None, int]:
    """(logits, label, reject logit or None, aim)"""
    classes = draw(st.integers(2, 6))
    logits = draw(st.lists(logit, min_size=classes, max_size=classes))
    reject = draw(st.one_of(st.none(), st.just(classes - 1))) if classes > 2 else None
    label = draw(st.integers(0, classes - 1 if reject is None else classes - 2))
    aim = draw(st.sampled_from([k for k in range(classes) if k not in (label, reject)]))
    return logits, label, reject, aim


def one(value: int) -> torch.Tensor:
    return torch.tensor([value])


@given(cases())
def test_leaving(case: tuple[list[float], int, int | None, int]) -> None:
    z, label, reject, aim = case
    logits = torch.tensor([z])
    winners = [z[k] for k in range(len(z)) if k not in (label, reject)]
    guards = [z[label]] if reject is None else [z[label], z[reject]]
    for goal in (Goal.leave(one(label), reject=reject), Goal.leave(one(label), aim=one(aim), reject=reject)):
        margin = float(goal.margin(logits))
        assert margin == pytest.approx(max(winners) - max(guards), rel=1e-5, abs=1e-6)
        # positive exactly where the answer is another class that is no rejection
        answer = int(Goal.decide(logits))
        if len(set(z)) == len(z):
            assert (margin > 0) == (answer not in (label, reject))


@given(cases())
def test_reaching(case: tuple[list[float], int, int | None, int]) -> None:
    z, label, reject, _ = case
    for wanted in {label, reject} - {None}:
        margin = float(Goal.attain(one(wanted), reject=reject).margin(torch.tensor([z])))
        rivals = [z[k] for k in range(len(z)) if k != wanted]  # a rejection is a rival too
        assert margin == pytest.approx(z[wanted] - max(rivals), rel=1e-5, abs=1e-6)


@given(cases())
def test_contest_names_the_pair_that_the_margin_compares(case: tuple[list[float], int, int | None, int]) -> None:
    z, label, reject, aim = case
    logits = torch.tensor([z])
    for goal in (Goal.leave(one(label), reject=reject), Goal.attain(one(label), reject=reject)):
        up, down = (int(k) for k in goal.contest(logits))
        assert up != down
        assert z[up] - z[down] == pytest.approx(float(goal.margin(logits)), rel=1e-5, abs=1e-6)
    up, _ = Goal.leave(one(label), aim=one(aim), reject=reject).contest(logits)
    assert int(up) == aim


@given(cases())
def test_of_label_and_rejection_only_the_higher_contends(case: tuple[list[float], int, int | None, int]) -> None:
    z, label, reject, aim = case
    logits = torch.tensor([z])
    assert torch.equal(Goal.attain(one(label), reject=reject).contending(logits), logits)
    for goal in (Goal.leave(one(label), reject=reject), Goal.leave(one(label), aim=one(aim), reject=reject)):
        guard, left = int(goal.guard(logits)), goal.contending(logits)
        assert guard in (label, reject)
        assert z[guard] == max(z[k] for k in {label, reject} - {None})
        gone = {label, reject} - {None, guard}
        assert [float(v) for v in left[0]] == [-math.inf if k in gone else z[k] for k in range(len(z))]
        assert torch.equal(goal.margin(left), goal.margin(logits))
    if reject is not None:  # to leave the rejection itself is to leave a class like others
        assert torch.equal(Goal.leave(one(reject), reject=reject).contending(logits), logits)


def test_a_rejection_is_no_success_and_leaving_beats_it_too() -> None:
    goal = Goal.leave(torch.tensor([0, 0, 0]), reject=2)
    logits = torch.tensor([[1.0, 0.0, 5.0], [1.0, 6.0, 5.0], [1.0, 4.0, 5.0]])
    assert goal.margin(logits).tolist() == [-5.0, 1.0, -1.0]
    assert Goal.attain(torch.tensor([2]), reject=2).margin(logits[:1]).tolist() == [4.0]


def test_rows_of_both_kinds_mix() -> None:
    goal = Goal(torch.tensor([0, 1]), torch.tensor([False, True]), torch.tensor([-1, -1]))
    assert goal.margin(torch.tensor([[1.0, 3.0], [1.0, 3.0]])).tolist() == [2.0, 2.0]
    assert goal.sign.tolist() == [1.0, -1.0]


def test_pivot_and_sign() -> None:
    leave = Goal.leave(torch.tensor([0, 1, 2]), aim=torch.tensor([-1, 3, -1]))
    assert leave.pivot.tolist() == [0, 3, 2]
    assert leave.sign.tolist() == [1.0, -1.0, 1.0]
    reach = Goal.attain(torch.tensor([4]))
    assert reach.pivot.tolist() == [4]
    assert reach.sign.tolist() == [-1.0]


@pytest.mark.parametrize("make", [Goal.leave, Goal.attain])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_is_never_a_success(make: Any, place: int) -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0]])
    logits[0, place] = math.nan
    margin = make(torch.tensor([0, 0])).margin(logits)
    assert margin[0] == -math.inf
    assert margin[1].isfinite()
    assert make(torch.tensor([0, 0]), reject=2).margin(logits)[0] == -math.inf


def test_infinite_logits() -> None:
    goal = Goal.leave(torch.tensor([0, 0, 0]))
    logits = torch.tensor([[-math.inf, 1.0, 0.0], [1.0, -math.inf, 0.0], [math.inf, math.inf, 0.0]])
    assert goal.margin(logits).tolist() == [math.inf, -1.0, -math.inf]


def test_a_masked_class_does_not_hide_successes() -> None:
    for masked in (-1e9, -math.inf):
        logits = torch.tensor([[1.0, 1.5, masked]])
        assert bool(Goal.leave(one(0)).margin(logits) > rounding(logits))


def test_a_margin_within_rounding_is_no_success() -> None:
    logits = torch.tensor([[1000.0, torch.nextafter(torch.tensor(1000.0), torch.tensor(2e3)), 0.0], [0.0, 1e-30, -5.0]])
    assert (Goal.leave(torch.tensor([0, 0])).margin(logits) > rounding(logits)).tolist() == [False, True]


def test_margin_does_not_touch_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, math.nan]])
    before = logits.clone()
    for goal in (Goal.leave(one(0), reject=2), Goal.attain(one(0), reject=2), Goal.leave(one(0))):
        goal.margin(logits)
        goal.contest(logits)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


# --- what counts as logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_becomes_a_pair(shape: tuple[int, ...]) -> None:
    z = torch.tensor([-1.0, 0.5, 2.0, -3.0])
    logits = classify(lambda x: z.view(shape), torch.zeros(4, 2))
    assert logits.tolist() == [[0.0, -1.0], [0.0, 0.5], [0.0, 2.0], [0.0, -3.0]]
    assert Goal.decide(logits).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (torch.zeros(3, 5), r"\(3, 5\) to 4 inputs"),
        (torch.zeros(4, 2, 2), "shape"),
        (torch.zeros(4, 0), "shape"),
        (torch.zeros(4, 2, dtype=torch.int64), "int64"),
        ((torch.zeros(4, 2),), "tuple"),
        (None, "NoneType"),
    ],
)
def test_other_answers_are_refused(answer: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        classify(lambda x: answer, torch.zeros(4, 3))


def test_an_error_of_the_model_names_shape_and_cause() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("wrong size")

    with pytest.raises(ModelError, match=r"ValueError.*\(4, 3\).*wrong size") as caught:
        classify(broken, torch.zeros(4, 3))
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("reject", [-1, 1.0, True])
def test_the_rejection_is_counted_from_the_first_logit(reject: Any) -> None:
    x = torch.rand(2, 4)
    with pytest.raises(UsageError, match="reject must be the index of a logit, counted from 0"):
        mohs.attack(PGD(steps=1), nn.Linear(4, 3).eval(), x, torch.tensor([0, 1]), "linf:0.1", reject=reject)
