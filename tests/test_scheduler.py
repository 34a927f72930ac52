"""The scheduler, driven by planted attacks whose steps and successes are known beforehand."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from core_models import Counting, Linear, RowByRow, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Access, Linf, Stop, Threat
from mohs.attacks import DeepFool, Job, State
from mohs.errors import DataError, ModelError, UsageError
from mohs.problem import Problem

HIT = 0.5


class First(nn.Module):
    """Class 1 where the first number is above HIT, else class 0; the second number is a planted example's name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x[:, 0]), (x[:, 0] - HIT) * 10], 1)


@dataclass(frozen=True)
class Planted:
    """Row (example, number) succeeds at its ``plan[example][number]``-th look (from 0), never where that is None."""

    plan: tuple[tuple[int | None, ...], ...]
    steps: int = 6
    needs: ClassVar[Access] = Access.LABEL
    finite: ClassVar[bool] = True

    def init(self, problem: Problem) -> State:
        return State(self._at(problem, 0))

    def step(self, problem: Problem, state: State, k: int) -> State:
        problem.look(state.x)
        return State(self._at(problem, k + 1))

    def _at(self, problem: Problem, look: int) -> Tensor:
        x = problem.x0.clone()
        name = (problem.x0[:, 1] * 1000).round().long().tolist()
        for i, (example, number) in enumerate(zip(name, problem.number.tolist(), strict=True)):
            due = self.plan[example][number % len(self.plan[example])]
            # some progress with every look, by which failing rows are compared
            x[i, 0] = HIT + 0.1 + 0.01 * number if due == look else 0.1 + 0.01 * look + 0.001 * number
        return x


def names(rows: int) -> tuple[Tensor, Tensor]:
    x = torch.zeros(rows, 2)
    x[:, 1] = torch.arange(rows) / 1000
    return x, torch.zeros(rows, dtype=torch.int64)


def plan_of(rows: int, restarts: int, seed: int, steps: int = 6) -> tuple[tuple[int | None, ...], ...]:
    r = random.Random(seed)
    return tuple(tuple(r.choice([None, None, *range(steps + 1)]) for _ in range(restarts)) for _ in range(rows))


def in_sequence(plan: tuple[int | None, ...], steps: int) -> tuple[int, int]:
    """(answering row or -1, looks spent) if the rows of one example were run one after the other."""
    spent = 0
    for number, due in enumerate(plan):
        spent += steps + 1 if due is None else due + 1
        if due is not None:
            return number, spent
    return -1, spent


ANY = "linf:1"


@pytest.mark.parametrize("batch", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("seed", range(6))
def test_answers_and_costs_are_those_of_rows_run_in_sequence(seed: int, batch: int) -> None:
    rows, restarts = 21, 4
    plan = plan_of(rows, restarts, seed)
    x, y = names(rows)
    out = mohs.attack(Planted(plan), First(), x, y, ANY, restarts=restarts, batch=batch)
    want = [in_sequence(p, 6) for p in plan]
    assert out.restart.tolist() == [w[0] for w in want]
    assert out.success.tolist() == [w[0] >= 0 for w in want]
    assert out.forwards.tolist() == out.queries.tolist() == [w[1] for w in want]
    assert not out.backwards.any()
    for i, (number, _) in enumerate(want):
        if number >= 0:
            assert float(out.x[i, 0]) == pytest.approx(HIT + 0.1 + 0.01 * number)
        else:  # the best of what failed
            assert float(out.x[i, 0]) == pytest.approx(0.1 + 0.01 * 6 + 0.001 * (restarts - 1))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    again = mohs.attack(Planted(plan), First(), x[order], y, ANY, restarts=restarts, batch=batch)
    for field in ("x", "success", "size", "margin", "restart", "forwards", "queries"):
        assert torch.equal(getattr(again, field), getattr(out, field)[order]), field


def test_settled_rows_leave() -> None:
    # 64 examples, of which all but two are through after the first look
    plan = tuple((None,) if i in (5, 40) else (0,) for i in range(64))
    x, y = names(64)
    model = Counting(First())
    out = mohs.attack(Planted(plan), model, x, y, ANY, batch=8)
    assert int(out.success.sum()) == 62
    # eight batches look once; the two that are left share one batch for the other five steps and the last look
    assert model.forwards == 8 + 5 + 1
    assert model.shapes == {(8, 2)}
    assert out.spent == 62 + 2 * 7


def test_a_success_cancels_the_rows_above_it_only() -> None:
    # row 2 succeeds at once and cancels row 3 (which would spend all), but rows 0 and 1 go on, and row 1 answers
    plan = ((None, 5, 0, None),)
    x, y = names(1)
    model = Counting(First())
    job = Job(Planted(plan), model, x, y, Threat.parse(ANY), restarts=4, batch=4)
    list(job.run())
    out = job.outcome()
    assert out.restart.tolist() == [1]
    assert job.cost[0, 0].tolist() == [7, 6, 1, 1]
    assert out.forwards.tolist() == [13]  # rows 0 and 1, as if in sequence
    assert out.spent == 15


def test_rows_above_an_answer_do_not_start() -> None:
    plan = tuple((0, None, None) for _ in range(32))
    x, y = names(32)
    model = Counting(First())
    mohs.attack(Planted(plan), model, x, y, ANY, restarts=3, batch=8)
    assert model.forwards == 4


def test_examples_are_reported_once_when_final() -> None:
    plan = plan_of(40, 3, seed=1)
    x, y = names(40)
    job = Job(Planted(plan), First(), x, y, Threat.parse(ANY), restarts=3, batch=4)
    seen: list[int] = []
    for final in job.run():
        now = job.success[final].clone(), job.best[final].clone()
        seen += final.tolist()
        assert all(in_sequence(plan[i], 6)[0] >= 0 for i, s in zip(final.tolist(), now[0].tolist(), strict=True) if s)
        assert torch.equal(now[1], job.outcome().x[final])
    assert sorted(seen) == list(range(40))
    calls: list[tuple[int, int]] = []
    mohs.attack(
        Planted(plan),
        First(),
        x,
        y,
        ANY,
        restarts=3,
        batch=4,
        progress=lambda done, broken: calls.append((done, broken)),
    )
    assert calls[-1] == (40, sum(in_sequence(p, 6)[0] >= 0 for p in plan))
    assert calls == sorted(calls)


def test_the_last_iterate_is_looked_at() -> None:
    x, y = names(1)
    assert mohs.attack(Planted(((6,),)), First(), x, y, ANY).success.tolist() == [True]


def test_trace_is_the_objective_at_every_look() -> None:
    plan = ((2, None), (None, None))
    x, y = names(2)
    out = mohs.attack(Planted(plan), First(), x, y, ANY, restarts=2, trace=True, batch=8)
    assert out.trace is not None
    assert out.trace.shape == (2, 2, 7)
    progress = 10 * (0.1 + 0.01 * torch.arange(7) - HIT)
    torch.testing.assert_close(out.trace[1, 0], progress)
    torch.testing.assert_close(out.trace[1, 1], progress + 0.01)
    assert out.trace[0, 0, 2] == pytest.approx(1.0)  # the success; the row goes on
    assert out.forwards.tolist() == [14, 14]
    with pytest.raises(UsageError, match="trace"):
        mohs.attack(Planted(plan), First(), x, y, ANY, trace=True, stop=Stop.SUCCESS)


def test_trace_is_nan_after_a_row_is_done() -> None:
    x = inputs(4, 5)
    out = mohs.attack(DeepFool(steps=9), Linear(5), x, Linear(5)(x).argmax(1), "l2:inf in [-9, 9]", trace=True)
    assert out.trace is not None
    looked = (~out.trace.isnan()).sum(2).squeeze(1)
    assert torch.equal(looked, out.forwards)
    assert bool((looked < 10).all())


def test_trace_uses_one_objective_to_the_end() -> None:
    net, x = relu_net((6,)), inputs(5, 6)
    y = net(x).argmax(1)
    out = mohs.attack(mohs.attacks.BIM(steps=3), net, x, y, "linf:0.01", trace=True)
    assert out.trace is not None
    last = nn.functional.cross_entropy(net(out.x), y, reduction="none")
    torch.testing.assert_close(out.trace[:, 0].amax(1), last.detach())
    assert bool((out.trace[:, 0].diff(dim=1) > 0).all())


def test_the_whole_budget_keeps_the_best_success() -> None:
    # row 0 succeeds weakly at look 1, row 2 strongly at look 4; both run on to the end
    plan = ((1, None, 4),)
    x, y = names(1)
    out = mohs.attack(Planted(plan), First(), x, y, ANY, restarts=3, stop=Stop.BUDGET)
    assert float(out.x[0, 0]) == pytest.approx(HIT + 0.12)
    assert out.restart.tolist() == [2]
    assert out.forwards.tolist() == [21]
    first = mohs.attack(Planted(plan), First(), x, y, ANY, restarts=3)
    assert float(first.x[0, 0]) == pytest.approx(HIT + 0.1)


def test_only_points_inside_the_region_are_kept() -> None:
    x, y = names(2)
    out = mohs.attack(Planted(((0,), (None,))), First(), x, y, "linf:0.2")
    assert out.success.tolist() == [False, False]
    assert bool((out.x - x).abs().le(0.2 + 1e-6).all())
    assert out.size.isinf().all()


def test_a_radius_per_example_holds() -> None:
    x, y = names(3)
    plan = ((0,), (0,), (0,))  # each needs 0.6
    out = mohs.attack(Planted(plan), First(), x, y, ANY, eps=torch.tensor([0.5, 0.61, 1.0]))
    assert out.success.tolist() == [False, True, True]
    net, z = relu_net((6,)), inputs(8, 6)
    free = mohs.attack(DeepFool(), net, z, net(z).argmax(1), Threat(mohs.L2(float("inf")), box=(-9, 9)))
    limit = free.size.median().expand(8).clone()
    out = mohs.attack(DeepFool(), net, z, net(z).argmax(1), Threat(mohs.L2(float("inf")), box=(-9, 9)), eps=limit)
    assert torch.equal(out.success, free.size <= limit)


# --- queries --------------------------------------------------------------------------------------------------------


def test_looks_beyond_the_limit_are_not_recorded() -> None:
    x, y = names(3)
    plan = ((2,), (3,), (None,))
    out = mohs.attack(Planted(plan), First(), x, y, Threat(Linf(1.0), queries=3))
    assert out.success.tolist() == [True, False, False]
    assert out.queries.tolist() == [3, 3, 3]


def test_restarts_share_the_limit_of_their_example() -> None:
    x, y = names(4)
    out = mohs.attack(Planted(((None,),) * 4), First(), x, y, Threat(Linf(1.0), queries=7), restarts=3)
    assert int(out.queries.max()) <= 7
    net, z = relu_net((6,)), inputs(4, 6)
    out = mohs.attack(
        mohs.attacks.PGD(steps=9), net, z, net(z).argmax(1), Threat(Linf(0.01), queries=9), restarts=2, aims=2
    )
    assert int(out.queries.max()) <= 9
    with pytest.raises(UsageError, match="queries"):
        mohs.attack(Planted(((None,),)), First(), *names(1), Threat(Linf(1.0), queries=2), restarts=3)


# --- who judges -----------------------------------------------------------------------------------------------------


def test_a_lying_guide_convinces_nobody() -> None:
    net, x = relu_net((6,)), inputs(12, 6)
    y = net(x).argmax(1)

    class Liar(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return -net(z)  # every clean input looks misclassified

    out = mohs.attack(mohs.attacks.PGD(steps=3), net, x, y, "linf:0.001", guide=Liar())
    assert not out.success.any()
    assert torch.equal(net(out.x).argmax(1), y)


def test_a_guide_gives_gradients_and_the_model_judges() -> None:
    net, x = Linear(6, 3), inputs(32, 6)
    y = net(x).argmax(1)

    class Steps(nn.Module):
        """The same answers without gradients."""

        def forward(self, z: Tensor) -> Tensor:
            return net(z.detach())

    with pytest.raises(ModelError, match="gradient"):
        mohs.attack(mohs.attacks.PGD(steps=5), Steps(), x, y, "linf:0.3")
    masked = mohs.attack(mohs.attacks.PGD(steps=5), Steps(), x, y, "linf:0.3", guide=net)
    assert torch.equal(masked.success, mohs.attack(mohs.attacks.PGD(steps=5), net, x, y, "linf:0.3").success)
    assert torch.equal(net(masked.x).argmax(1) != y, masked.success)


def test_the_guide_must_be_in_eval_mode_too() -> None:
    net, x = relu_net((6,)), inputs(3, 6)
    guide = nn.Sequential(nn.BatchNorm1d(6), relu_net((6,)))
    with pytest.raises(ModelError, match="training mode"):
        mohs.attack(mohs.attacks.PGD(steps=2), net, x, net(x).argmax(1), "linf:0.1", guide=guide)


class Flickering(nn.Module):
    """Fooled by a share of its looks, whatever the input is."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        fooled = torch.rand(len(x)) < self.share
        z = torch.stack([torch.zeros(len(x)), torch.where(fooled, 1.0, -1.0)], 1)
        return z + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(("share", "broken"), [(0.2, 0), (0.8, 64)])
def test_a_random_model_is_judged_on_fresh_draws(share: float, broken: int) -> None:
    x, y = inputs(64, 3), torch.zeros(64, dtype=torch.int64)
    before = torch.get_rng_state()
    lucky = mohs.attack(mohs.attacks.PGD(steps=5), Flickering(share), x, y, "linf:0.1")
    assert int(lucky.success.sum()) > 40  # one look in six is enough to be lucky
    fair = mohs.attack(mohs.attacks.PGD(steps=5), Flickering(share), x, y, Threat(Linf(0.1), draws=41))
    assert abs(int(fair.success.sum()) - broken) <= 2
    aimed = mohs.attack(mohs.attacks.PGD(steps=2), Flickering(share), x, y, Threat(Linf(0.1), draws=5), aims=1)
    assert torch.equal(before, torch.get_rng_state())
    again = mohs.attack(mohs.attacks.PGD(steps=2), Flickering(share), x, y, Threat(Linf(0.1), draws=5), aims=1)
    assert torch.equal(aimed.success, again.success)


# --- aims -----------------------------------------------------------------------------------------------------------


def test_aims_try_the_most_likely_classes_first_and_any_other_class_counts() -> None:
    net, x = RowByRow(8, classes=5), inputs(20, 8)
    y = net(x).argmax(1)
    one = mohs.attack(mohs.attacks.PGD(steps=8), net, x, y, "linf:0.12", aims=1, batch=8)
    three = mohs.attack(mohs.attacks.PGD(steps=8), net, x, y, "linf:0.12", aims=3, batch=8)
    assert bool((three.success | ~one.success).all())
    assert bool((three.restart <= 2).all())
    assert torch.equal(net(three.x).argmax(1) != y, three.success)
    alone = mohs.attack(mohs.attacks.PGD(steps=8), net, x[7:8], y[7:8], "linf:0.12", aims=3, batch=8)
    assert torch.equal(alone.x, three.x[7:8])
    assert alone.forwards.tolist() == three.forwards[7:8].tolist()
    with pytest.raises(UsageError, match=r"5 classes.*at most 4"):
        mohs.attack(mohs.attacks.PGD(), net, x, y, "linf:0.1", aims=5)
    with pytest.raises(UsageError, match="exclude"):
        mohs.attack(mohs.attacks.PGD(), net, x, y, "linf:0.1", aims=2, targets=(y + 1) % 5)


# --- wrong arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"restarts": 0}, "restarts"),
        ({"batch": 0}, "batch"),
        ({"batch": 2.0}, "batch"),
        ({"aims": -1}, "aims"),
        ({"eps": torch.tensor([0.1])}, "one radius"),
        ({"eps": torch.tensor([0.1, -0.1, 0.1])}, ">= 0; row 1"),
        ({"targets": torch.tensor([0, 1, 1])}, r"row 0"),
        ({"targets": torch.tensor([1, 1, 2])}, "2 classes; row 2"),
        ({"y": torch.tensor([0, 0, 3])}, "2 classes; row 2"),
        ({"y": torch.tensor([0, -1, -2])}, "rows 1 and 2"),
        ({"y": torch.tensor([0.0, 0.0, 0.0])}, "int64"),
        ({"y": torch.zeros(4, dtype=torch.int64)}, r"shape \(3,\)"),
        ({"x": torch.zeros(3, 2, dtype=torch.uint8)}, "float32 or float64"),
        ({"x": torch.tensor([[0.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])}, r"rows 1 and 2.*normalised"),
        ({"x": torch.tensor([[0.0, 0.0], [0.0, float("nan")], [0.0, 0.0]])}, "nan or inf in row 1"),
        ({"x": np.zeros((3, 2))}, "ndarray"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict, words: str) -> None:
    x, y = names(3)
    given = {"x": x, "y": y, "targets": None} | change
    with pytest.raises((DataError, UsageError), match=words):
        mohs.attack(mohs.attacks.PGD(steps=1), First(), given.pop("x"), given.pop("y"), "linf:0.1", **given)


@dataclass(frozen=True)
class Greedy(Planted):
    """Row r asks for as many looks a step as its name's last digit says; the scheduler may know it beforehand."""

    told: bool = True
    batches: ClassVar[list[list[int]]] = []

    def step(self, problem: Problem, state: State, k: int) -> State:
        name = (problem.x0[:, 1] * 1000).round().long()
        live = ~problem.found.settled
        type(self).batches.append((name % 2)[live].tolist())
        state = super().step(problem, state, k)
        return State(state.x, demand=(name % 2).float() if self.told else None)


def test_rows_of_like_demand_share_a_batch_and_answers_do_not_change() -> None:
    x, y = names(32)
    plan = tuple((5,) if i % 3 else (None,) for i in range(32))
    found = {}
    for told in (False, True):
        Greedy.batches.clear()
        found[told] = mohs.attack(Greedy(plan, told=told), First(), x, y, "linf:1", batch=8)
        mixed = [batch for batch in Greedy.batches[4:] if len(set(batch)) > 1]  # nothing is known of the first step
        assert bool(mixed) is not told
    assert torch.equal(found[True].x, found[False].x)
    assert torch.equal(found[True].success, found[False].success)
    assert torch.equal(found[True].forwards, found[False].forwards)


def test_a_projected_point_is_checked_again_once_it_was_changed() -> None:
    @dataclass(frozen=True)
    class Cheat(Planted):
        def step(self, problem: Problem, state: State, k: int) -> State:
            x = problem.project(problem.x0)
            x[:, 0] = HIT + 0.2  # outside the region
            problem.look(x)
            return State(x)

    x, y = names(4)
    out = mohs.attack(Cheat(((None,),) * 4), First(), x, y, "linf:0.1")
    assert not bool(out.success.any())
    assert torch.equal(out.x, x)
