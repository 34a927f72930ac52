"""Plans whose steps stand on one another: from the best point so far, on the survivors that are nearest to breaking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_problem import evaluate, relay_plan

from mohs import records
from mohs.errors import UsageError
from mohs.evaluation import Plan, PlanStep, engine
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
    assert len(set(ran.tolist()) & set(np.flatnonzero(alive).tolist())) >= np.ceil(record.n * engine.LEAST)


def test_a_first_step_from_the_best_point_begins_by_itself(tmp_path: Path) -> None:
    own = Plan("own", (PlanStep.make("Square", {"steps": 20}),))
    best = Plan("best", (PlanStep.make("Square", {"steps": 20}, start="best"),))
    a = evaluate(plan=own, threat="linf:0.1", out=tmp_path / "a")
    b = evaluate(plan=best, threat="linf:0.1", out=tmp_path / "b")
    assert a.results(0).margin.tolist() == b.results(0).margin.tolist()


@pytest.mark.parametrize("threat", ["linf:0.05", "l2:0.3", "l1:1", "l3:0.3", "l0:2"])
@pytest.mark.parametrize("plan", ["quick", "standard"])
def test_built_in_plans_serve_every_region(plan: str, threat: str, tmp_path: Path) -> None:
    from engine_problem import images

    record = evaluate(images().take(8), plan=plan, threat=threat, out=tmp_path / "run")
    assert len(record.header.attacks) >= 1
    assert record.header.status == "complete"


def test_rank_reaches_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def spy(problem: object, count: int) -> torch.Tensor:
        from mohs.attacks import by_distance

        asked.append(count)
        return by_distance(problem, count)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "by_distance", spy)
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
