"""Plans whose steps stand on one another: from the best point so far, on the survivors that are nearest to breaking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_problem import conv, evaluate, images, relay_plan
from torch import Tensor, nn

import mohs
from mohs import Access, Threat, records
from mohs.errors import UsageError
from mohs.evaluation import Plan, PlanStep, _order, _stages, engine
from mohs.problem import Problem
from mohs.records.ledger import Ledger

SMALL = "linf:0.01"
"""So small that most examples survive."""


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> records.Record:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CONTROL", 3)
        return evaluate(plan=relay_plan(), threat=SMALL, out=tmp_path_factory.mktemp("relay") / "run")


def best_margin(record: records.Record, before: int) -> np.ndarray:
    best = -record.examples.clean_margin
    for attack in range(before):
        rows = record.results(attack)
        best[rows.example] = np.maximum(best[rows.example], rows.margin)
    return best


def test_a_share_takes_the_survivors_nearest_to_breaking(relay: records.Record) -> None:
    last = len(relay_plan().steps) - 1
    alive = relay.correct & ((relay.breaker < 0) | (relay.breaker >= last))
    ran = np.zeros(relay.n, dtype=bool)
    ran[relay.results(last).example] = True
    chosen, left = alive & ran & ~relay.examples.control, alive & ~ran
    assert chosen.sum() > 3
    assert left.sum() > 3
    margin = best_margin(relay, last)
    assert margin[chosen].min() >= margin[left].max()
    assert ran[relay.examples.control & relay.correct].all(), "the control subset is always run in full"
    summary = relay.header.attacks[last]
    assert summary.given == int((alive & ran).sum())


def test_going_on_from_the_best_point_never_falls_behind_it(relay: records.Record) -> None:
    step = next(i for i, s in enumerate(relay_plan().steps) if s.start == "best")
    rows = relay.results(step)
    alive = relay.correct & ((relay.breaker < 0) | (relay.breaker >= step))
    of = alive[rows.example] & ~rows.success
    before = best_margin(relay, step)[rows.example[of]]
    assert of.sum() > 5
    # the third attack climbed cross-entropy, so its best point need not be that of highest margin; the fourth begins there
    assert np.median(rows.margin[of] - before) > 0


def test_points_of_survivors_are_forgotten_at_the_end(relay: records.Record) -> None:
    with Ledger.open(relay.dir / "ledger.sqlite") as ledger:
        ids, _ = ledger.nearest()
    assert len(ids) == 0


def test_few_survivors_are_not_cut(tmp_path: Path) -> None:
    plan = Plan("cut", (PlanStep.make("FGSM"), PlanStep.make("PGD", {"steps": 2}, share=0.01)))
    record = evaluate(plan=plan, threat=SMALL, out=tmp_path / "run")
    alive = record.correct & ((record.breaker < 0) | (record.breaker >= 1))
    ran = record.results(1).example
    assert len(set(ran.tolist()) & set(np.flatnonzero(alive).tolist())) >= np.ceil(record.n * _order.LEAST)


def test_a_first_step_from_the_best_point_begins_by_itself(tmp_path: Path) -> None:
    own = Plan("own", (PlanStep.make("Square", {"steps": 20}),))
    best = Plan("best", (PlanStep.make("Square", {"steps": 20}, start="best"),))
    a = evaluate(plan=own, threat="linf:0.1", out=tmp_path / "a")
    b = evaluate(plan=best, threat="linf:0.1", out=tmp_path / "b")
    assert a.results(0).margin.tolist() == b.results(0).margin.tolist()


@pytest.mark.parametrize("threat", ["linf:0.05", "l2:0.3", "l1:1", "l3:0.3", "l0:2"])
@pytest.mark.parametrize("plan", ["quick", "standard"])
def test_built_in_plans_serve_every_region(plan: str, threat: str, tmp_path: Path) -> None:
    record = evaluate(images().take(8), plan=plan, threat=threat, out=tmp_path / "run")
    assert len(record.header.attacks) >= 1
    assert record.header.status == "complete"


def test_rank_reaches_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def spy(problem: Problem, count: int) -> torch.Tensor:
        from mohs.attacks import by_distance

        asked.append(count)
        return by_distance(problem, count)

    monkeypatch.setattr(_stages, "by_distance", spy)
    plan = Plan("aimed", (PlanStep.make("PGD", {"steps": 2}, aims=3, rank="distance"),))
    evaluate(plan=plan, out=tmp_path / "run")
    assert set(asked) == {3}


def test_without_a_control_subset_nothing_runs_twice(tmp_path: Path) -> None:
    from mohs.reports import render, text

    whole = evaluate(plan=relay_plan(), threat=SMALL, out=tmp_path / "whole")
    lean = evaluate(plan=relay_plan(), threat=SMALL, out=tmp_path / "lean", control=0)
    assert not lean.examples.control.any()
    assert (lean.survived == whole.survived).all()
    for index in lean.attacks:
        assert len(lean.results(index)) == lean.header.attacks[index].given
    assert lean.traces() == []
    render(lean, tmp_path / "page.html")
    assert "upper bound" in (tmp_path / "page.html").read_text()
    assert text(lean)


@pytest.mark.parametrize("control", [-1, 0.5, "all"])
def test_a_bad_control_subset_is_refused(control: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="control must be a whole number"):
        evaluate(control=control, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Rippled(nn.Module):
    """A net whose gradients point nowhere: its input is shaken faster than any step can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.004 * (800 * x).sin())


def test_a_step_goes_on_as_long_as_it_breaks_what_it_is_given(tmp_path: Path) -> None:
    data, model = images().take(200), Rippled().eval()
    plan = Plan("masked", (PlanStep.make("FGSM"), PlanStep.make("Square", {"steps": 200}, start="best", share=0.125)))
    record = evaluate(data, model, plan=plan, threat="linf:0.1", out=tmp_path / "a", control=0, adaptive="off")
    whole = Plan("whole", (PlanStep.make("FGSM"), PlanStep.make("Square", {"steps": 200}, start="best")))
    every = evaluate(data, model, plan=whole, threat="linf:0.1", out=tmp_path / "b", control=0, adaptive="off")
    given = record.header.attacks[1].given
    alive = int((record.correct & (record.breaker != 0)).sum())
    assert given > 2 * int(np.ceil(0.125 * alive)), "the first portion broke, so more must follow"
    assert int(record.survived.sum()) - int(every.survived.sum()) <= 0.1 * alive


class Planned:
    """Breaks exactly the examples it is told to, by their place in the order of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, breaks: set[int]) -> None:
        self.given: list[list[int]] = []
        run, write = _stages.Evaluation._run, _stages.Evaluation.write

        def told(evaluation: Any, index: int, stage: str, name: str, todo: Tensor, *given: Any) -> None:
            if index == 1:
                self.given.append(todo.tolist())
            run(evaluation, index, stage, name, todo, *given)

        def written(evaluation: Any, index: int, ids: Tensor, found: Any, alive: Any) -> None:
            if index == 1:
                place = {example: at for at, example in enumerate(i for part in self.given for i in part)}
                won = torch.tensor([place[i] in breaks for i in ids.tolist()], dtype=torch.bool)
                found = replace(found, success=won, x=found.x.clone())
            write(evaluation, index, ids, found, alive)

        monkeypatch.setattr(_stages.Evaluation, "_run", told)
        monkeypatch.setattr(_stages.Evaluation, "write", written)


@pytest.mark.parametrize(("breaks", "portions"), [(set(), 1), ({0, 1}, 1), ({3}, 2), ({3, 7}, 3), ({5, 6, 7}, 1)])
def test_the_next_portion_follows_where_the_farther_half_broke(
    breaks: set[int], portions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Portions of four: places 0 and 1 of each are near, 2 and 3 are far."""
    planned = Planned(monkeypatch, breaks)
    plan = Plan("two", (PlanStep.make("FGSM"), PlanStep.make("PGD", {"steps": 2}, share=0.01)))
    data = images().take(250)
    evaluate(data, plan=plan, threat="linf:0.01", out=tmp_path / "run", control=0, batch=64)
    assert [len(part) for part in planned.given] == [4] * portions


def test_whom_no_attack_has_tried_is_never_cut(tmp_path: Path) -> None:
    plan = Plan("black", (PlanStep.make("PGD"), PlanStep.make("Square", {"steps": 10}, share=0.1)))
    threat = Threat(mohs.Linf(0.002), access=Access.SCORE)
    record = evaluate(plan=plan, threat=threat, out=tmp_path / "run", control=0)
    assert record.attacks == [0]  # of those that can run
    assert len(record.results(0)) == int(record.correct.sum())


def test_resuming_inside_a_first_step_that_would_begin_at_the_best_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mohs.attacks.run.WAVE", 1)  # so that a step is written down in several parts
    square = PlanStep.make("Square", {"steps": 12}, start="best")
    plan = Plan("squares", (square, PlanStep.make("Square", {"steps": 14}, start="best")))
    settings = {"plan": plan, "threat": Threat(mohs.Linf(0.02), access=Access.SCORE), "batch": 8}
    whole = evaluate(out=tmp_path / "whole", **settings)

    def interrupt(stage: str, done: int, total: int, broken: int) -> None:
        if stage.startswith("1/2") and 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(out=tmp_path / "again", notify=interrupt, **settings)
    again = evaluate(out=tmp_path / "again", **settings)
    assert again.header.ledger_digest == whole.header.ledger_digest


def test_a_limit_of_queries_is_not_stretched_by_going_on(tmp_path: Path) -> None:
    plan = Plan(
        "limited", (PlanStep.make("Square", {"steps": 30}), PlanStep.make("Square", {"steps": 31}, start="best"))
    )
    threat = Threat(mohs.Linf(0.02), access=Access.SCORE, queries=10)
    chained = evaluate(plan=plan, threat=threat, out=tmp_path / "a")
    alone = Plan("alone", (PlanStep.make("Square", {"steps": 30}), PlanStep.make("Square", {"steps": 31})))
    apart = evaluate(plan=alone, threat=threat, out=tmp_path / "b")
    assert chained.results(1).margin.tolist() == apart.results(1).margin.tolist()
    assert int(chained.results(1).queries.max()) <= 10


def test_what_a_threat_cannot_pay_for_is_skipped_with_its_reason(tmp_path: Path) -> None:
    plan = Plan("aimed", (PlanStep.make("Square", {"steps": 5}), PlanStep.make("Square", {"steps": 5}, aims=3)))
    scores = evaluate(plan=plan, threat=Threat(mohs.Linf(0.02), access=Access.SCORE), out=tmp_path / "a")
    assert scores.attacks == [0]
    assert any("needs access LOGIT" in limit for limit in scores.header.limits)
    few = evaluate(plan=plan, threat=Threat(mohs.Linf(0.02), access=Access.LOGIT, queries=3), out=tmp_path / "b")
    assert few.attacks == [0]
    assert any("allows 3 queries" in limit for limit in few.header.limits)
