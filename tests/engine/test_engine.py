"""The engine: the bracket, the order of the plan, the summaries, and what a result may and may not depend on."""

from __future__ import annotations

import copy
import random
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from engine_problem import BATCH, THREAT, N, by_content, conv, evaluate, images, rows_of, short_plan
from torch import Tensor, nn

import mohs
from mohs import records
from mohs.attacks import FGSM, PGD, DeepFool
from mohs.certificates import CROWN, IBP, Certificate
from mohs.errors import CertificateContradicted, RecordError
from mohs.evaluation import Plan, PlanStep, _curves, engine
from mohs.threat import Access, Threat


@pytest.fixture(scope="module")
def whole() -> records.Record:
    return evaluate(claim="accuracy >= 0.5", certificates=[CROWN(), IBP()])


def broken_by(record: records.Record, attack: int) -> set[int]:
    rows = record.results(attack)
    return set(rows.example[rows.success].tolist())


# ---- the bracket -----------------------------------------------------------------------------------------


def test_certified_within_survived_within_correct(whole: records.Record) -> None:
    assert whole.certified is not None
    assert 0 < whole.certified.sum() <= whole.survived.sum() < whole.correct.sum() < N
    assert not (whole.certified & ~whole.survived).any()
    assert not (whole.survived & ~whole.correct).any()
    assert len(whole.contradicted) == 0
    found = {name: set(rows.example[rows.holds].tolist()) for name, rows in whole.certificates().items()}
    assert found["IBP"] < found["CROWN"]
    assert [c.certified for c in whole.header.certificates] == [len(found[c.name]) for c in whole.header.certificates]


def test_points_are_inside_and_wrong(whole: records.Record) -> None:
    x, y = images().take(N)
    for attack in whole.attacks:
        ids, points = whole.points(attack)
        assert set(ids.tolist()) == broken_by(whole, attack)
        found = torch.from_numpy(points)
        assert bool(((found - x[ids]).abs() <= 0.05 + 1e-6).all())
        assert bool(((found >= 0) & (found <= 1)).all())
        answers = conv()(found).argmax(1)
        assert not bool((answers == y[ids]).any())
        rows = whole.results(attack)
        assert rows.label_after[rows.success].tolist() == answers.tolist()
        _, inputs = whole.inputs(ids.tolist())
        assert np.array_equal(inputs, x[ids].numpy())


@dataclass(frozen=True)
class Gullible:
    """An unsound certificate: it believes every right answer."""

    name: ClassVar[str] = "Gullible"
    needs: ClassVar[Access] = Access.GRADIENT

    def prove(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, batch: int) -> Certificate:
        holds = model(x).argmax(1) == y
        return Certificate(holds, holds * threat.region.eps, torch.zeros(len(x)), 0.0, self.name)


def test_unsound_certificate_is_contradicted(tmp_path: Path) -> None:
    with pytest.raises(
        CertificateContradicted, match=r"declared rows? .* safe under linf:0.05, and an attack broke"
    ) as e:
        evaluate(claim="accuracy >= 0.5", certificates=[Gullible()], out=tmp_path / "run")
    assert e.value.exit_code == 13
    record = records.Record.load(tmp_path / "run")
    record.verify()
    assert record.header.status == "complete"
    assert record.verdict is None
    assert set(record.contradicted.tolist()) == set(np.flatnonzero(record.correct & ~record.survived).tolist()) != set()
    assert [a.name for a in record.header.attacks] == ["FGSM CE", "DeepFool-10", "PGD-8 CE x3"]
    assert record.header.certificates[0].certified == record.correct.sum()


def test_contradiction_without_a_directory_keeps_the_record() -> None:
    with pytest.raises(CertificateContradicted) as e:
        evaluate(images().take(16), certificates=[Gullible()])
    place = Path(str(e.value).split("the record ")[1].split(" with the model")[0])
    try:
        assert len(records.Record.load(place).contradicted)
    finally:
        for leftover in sorted(place.iterdir()):
            leftover.unlink()
        place.rmdir()


def test_misclassified_examples_are_never_attacked(whole: records.Record) -> None:
    wrong = set(np.flatnonzero(~whole.correct).tolist())
    assert wrong
    for attack in whole.attacks:
        assert not wrong & set(whole.results(attack).example.tolist())


# ---- order, control subset, summaries, curve -------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse() -> records.Record:
    """With a control subset of 12, so that most examples leave the plan once broken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CONTROL", 12)
        return evaluate(claim="accuracy >= 0.5")


def test_each_attack_gets_the_survivors_and_the_control_subset(sparse: records.Record) -> None:
    control = sparse.examples.control
    assert control.sum() == 12
    alive = sparse.correct.copy()
    for attack, summary in zip(sparse.attacks, sparse.header.attacks, strict=True):
        got = np.zeros(N, bool)
        got[sparse.results(attack).example] = True
        assert np.array_equal(got, sparse.correct & (alive | control))
        broke = np.zeros(N, bool)
        broke[list(broken_by(sparse, attack))] = True
        assert (summary.given, summary.broke) == (alive.sum(), (alive & broke).sum())
        alive &= ~broke
        assert summary.accuracy_after == alive.mean()
    assert np.array_equal(alive, sparse.survived)


def test_small_control_subset_changes_no_result(sparse: records.Record, whole: records.Record) -> None:
    assert np.array_equal(sparse.survived, whole.survived)
    for attack in sparse.attacks:
        kept = sparse.results(attack).example
        assert len(kept) < len(whole.results(attack).example) or attack == 0
        every = {row[0]: row for row in whole.results(attack).as_rows()}
        assert list(map(str, sparse.results(attack).as_rows())) == [str(every[e]) for e in kept.tolist()]


def test_alone_counts_are_those_of_each_attack_alone(sparse: records.Record) -> None:
    control = np.flatnonzero(sparse.examples.control & sparse.correct)
    x, y = images().take(indices=control.tolist())
    for summary, attack, restarts in zip(
        sparse.header.attacks, (FGSM(), DeepFool(steps=10), PGD(steps=8)), (1, 1, 3), strict=True
    ):
        alone = mohs.attack(attack, conv(), x, y, THREAT, restarts=restarts, batch=BATCH)
        assert (summary.alone_broke, summary.alone_n) == (int(alone.success.sum()), len(control))
        assert set(control[alone.success.numpy()].tolist()) == broken_by(sparse, summary.index) & set(control.tolist())


def test_summaries_are_those_of_the_ledger(whole: records.Record) -> None:
    assert [a.index for a in whole.header.attacks] == whole.attacks == [0, 1, 2]
    for summary, step in zip(whole.header.attacks, whole.header.plan.steps, strict=True):
        rows = whole.results(summary.index)
        assert (summary.forwards, summary.backwards, summary.queries) == (
            rows.forwards.sum(), rows.backwards.sum(), rows.queries.sum(),
        )  # fmt: skip
        assert summary.config == step.config
        assert summary.seconds > 0
    totals = whole.header.totals
    assert whole.certified is not None
    assert (totals.n, totals.clean_correct, totals.survived, totals.certified) == (
        N, whole.correct.sum(), whole.survived.sum(), whole.certified.sum(),
    )  # fmt: skip
    assert whole.robust_accuracy == whole.header.attacks[-1].accuracy_after
    assert f"{whole.survived.sum()} of n = {N}" in whole.verdict.sentence


def test_curve_is_monotone_and_meets_the_result(whole: records.Record) -> None:
    curve = whole.header.curve
    assert [p.eps for p in curve] == [0.0, *(r * 0.05 for r in _curves.CURVE)]
    counts = [p.survived for p in curve]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == whole.correct.sum() > counts[-1]
    assert {p.n for p in curve} == {N}
    at = next(p for p in curve if p.eps == 0.05)
    assert at.survived == whole.survived.sum()


def test_loss_curves_of_the_iterative_attack(whole: records.Record) -> None:
    traces = whole.traces()
    chosen = np.flatnonzero(whole.examples.control & whole.correct)[: _curves.TRACED]
    assert [(a, e, r) for a, e, r, _ in traces] == [(2, e, r) for e in chosen for r in range(_curves.TRACE_RESTARTS)]
    for *_, values in traces:
        assert len(values) == 9
        assert np.isfinite(values).all()
        assert values[-1] > values[0]


# ---- what a result depends on ----------------------------------------------------------------------------


def test_order_does_not_matter(whole: records.Record) -> None:
    order = list(range(N))
    random.Random(5).shuffle(order)
    shuffled = evaluate(images().take(N).take(indices=order), certificates=[CROWN(), IBP()])
    assert shuffled.examples.hash.tolist() == [whole.examples.hash[i] for i in order]
    assert np.array_equal(shuffled.survived, whole.survived[order])
    assert by_content([shuffled]) == by_content([whole])
    assert shuffled.certified is not None
    assert whole.certified is not None
    assert np.array_equal(shuffled.certified, whole.certified[order])


def test_subset_and_shards_do_not_matter(whole: records.Record) -> None:
    first, second = (evaluate(images().take(N).take(indices=range(at, N, 2))) for at in (0, 1))
    assert by_content([first, second]) == by_content([whole])
    few = by_content(
        [evaluate(images().take(24, 11))]
    )  # fewer make smaller batches, which some processors round otherwise
    assert few == {key: row for key, row in by_content([whole]).items() if key in few}


def test_batch_size_changes_at_most_what_rounding_decides(whole: records.Record) -> None:
    other = evaluate(batch=64)
    differing = np.flatnonzero(other.survived != whole.survived)
    assert len(differing) <= 1, f"rows {differing.tolist()} differ between batches of {BATCH} and 64"
    assert other.header.identity != whole.header.identity
    assert np.allclose(other.examples.clean_margin, whole.examples.clean_margin, atol=1e-5)


def test_seed_changes_identity_and_random_starts(whole: records.Record) -> None:
    other = evaluate(seed=1, certificates=[CROWN(), IBP()], claim="accuracy >= 0.5")
    assert other.header.identity != whole.header.identity
    mine, theirs = by_content([other]), by_content([whole])
    assert {k: v for k, v in mine.items() if k[0] < 2} == {k: v for k, v in theirs.items() if k[0] < 2}
    assert {k: v for k, v in mine.items() if k[0] == 2} != {k: v for k, v in theirs.items() if k[0] == 2}


@pytest.mark.parametrize(
    "change", [{"threat": "linf:0.06"}, {"plan": short_plan(steps=9)}, {"certificates": [IBP()]}, {"batch": 17}]
)
def test_identity_knows_what_results_depend_on(change: dict[str, Any]) -> None:
    data = images().take(3)
    base, same, other = evaluate(data), evaluate(data, subject="a name"), evaluate(data, **change)
    assert base.header.identity == same.header.identity != other.header.identity


def test_another_claim_is_judged_on_the_rows_of_a_finished_run(tmp_path: Path) -> None:
    out, told = tmp_path / "run", []

    def notify(stage: str, done: int, total: int, broken: int) -> None:
        told.append(stage)

    first = evaluate(claim="accuracy >= 0.9", out=out)
    written = (out / "record.json").read_bytes()
    same = evaluate(claim="accuracy >= 0.9", out=out, notify=notify, command="again")
    assert same.header == first.header
    assert (out / "record.json").read_bytes() == written
    again = evaluate(claim="accuracy >= 0.1", out=out, notify=notify)
    assert told == []  # no checks, no attacks, no curve
    assert first.verdict is not None
    assert again.verdict is not None
    assert (first.verdict.word, again.verdict.word) == ("refuted", "upheld so far")
    assert again.header.claim is not None
    assert again.header.claim.tau == 0.1
    assert again.digest() == first.digest()
    assert rows_of(again) == rows_of(first)
    none = evaluate(out=out)
    assert none.verdict is None
    assert none.header.claim is None


def test_a_finished_run_is_looked_at_again_where_the_statement_or_the_mode_is_new(tmp_path: Path) -> None:
    data, out = images().take(16), tmp_path / "run"
    assert evaluate(data, claim="accuracy >= 0.1", out=out).header.stated_accuracy is None
    blocked = evaluate(data, claim="accuracy >= 0.1", out=out, stated_accuracy=0.01)
    assert blocked.verdict is not None
    assert blocked.verdict.word == "blocked"
    assert blocked.header.stated_accuracy == 0.01
    assert evaluate(data, claim="accuracy >= 0.1", out=out).verdict.word != "blocked"
    told: list[str] = []
    model = copy.deepcopy(conv())
    evaluate(data, model, out=tmp_path / "other")
    model.train()
    evaluate(data, model, out=tmp_path / "other", notify=lambda stage, *_: told.append(stage))
    assert "checks" in told


def test_changed_rows_of_a_finished_run_are_refused(tmp_path: Path) -> None:
    data, out = images().take(8), tmp_path / "run"
    evaluate(data, out=out)
    with sqlite3.connect(out / "ledger.sqlite") as db:
        db.execute("UPDATE results SET margin = margin + 1 WHERE attack = 0")
    db.close()
    with pytest.raises(RecordError, match="the ledger was changed after the run"):
        evaluate(data, claim="accuracy >= 0.1", out=out)


def test_a_stale_verdict_never_stands_under_another_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    data, out = images().take(8), tmp_path / "run"
    evaluate(data, claim="accuracy >= 0.9", out=out)
    monkeypatch.setattr(engine.claims, "of_record", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, claim="accuracy >= 0.1", out=out)
    header = records.load_header(out)
    assert (header.claim.tau, header.verdict.word, header.status) == (0.9, "refuted", "complete")
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, claim="accuracy >= 0.1", out=out, stated_accuracy=0.01)
    header = records.load_header(out)
    assert (header.claim.tau, header.verdict, header.status) == (0.1, None, "interrupted")


def test_control_subset_is_drawn_by_content_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CONTROL", 12)
    plan = Plan("f", (PlanStep.make("FGSM"),))

    def chosen(**settings: Any) -> set[str]:
        record = evaluate(plan=plan, **settings)
        assert record.examples.control.sum() == 12
        return set(record.examples.hash[record.examples.control].tolist())

    data = images().take(N)
    drawn = chosen(data=data)
    assert drawn != set(data.ids[:12])
    assert drawn != chosen(data=data, seed=1)
    order = list(range(N))
    random.Random(3).shuffle(order)
    assert drawn == chosen(data=data.take(indices=order))
