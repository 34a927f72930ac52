"""Claims of every kind through an evaluation: fed, worded, stored, or refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_problem import N, conv, evaluate, images

from mohs.certificates import IBP
from mohs.errors import ClaimError
from mohs.evaluation import claims
from mohs.records import Record, lower_bound, upper_bound
from mohs.reports import render


def test_stability_counts_wrong_answers_as_not_attacked(tmp_path: Path) -> None:
    record = evaluate(claim="stability >= 0.95", out=tmp_path / "run")
    wrong, survived = int((~record.correct).sum()), int(record.survived.sum())
    assert wrong > 0
    assert record.verdict is not None
    assert record.verdict.upper == upper_bound(survived + wrong, N)
    assert record.header.claim is not None
    assert (record.header.claim.kind, record.header.claim.share) == ("stability", None)
    # an answer is attacked, right or wrong, where it is made the label: then accuracy is stability
    data = images().take(N)
    own = type(data)(data.x, conv()(data.x).argmax(1), data.classes, "own answers")
    answered = evaluate(own, claim="accuracy >= 0.95")
    assert answered.clean_accuracy == 1
    assert int(answered.survived.sum()) <= survived + wrong


def test_certified_counts_proofs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    record = evaluate(claim="certified >= 0.9", certificates=[IBP()], threat="linf:0.005", out=out)
    assert record.certified is not None
    assert record.verdict is not None
    assert record.verdict.lower == lower_bound(int(record.certified.sum()), N)
    assert record.verdict.word in ("refuted", "undecided", "certified")
    assert render(Record.load(out), tmp_path / "report.html")
    claim = Record.load(out).header.claim
    assert claim is not None
    assert "certified" in claim.text


def test_of_these_examples_is_exact_and_may_be_asked_of_a_complete_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    survived = int(evaluate(claim="accuracy >= 0.5", out=out).survived.sum())
    for share, word in ((survived / N, "upheld so far"), ((survived + 1) / N, "refuted")):
        verdict = evaluate(claim=f"accuracy >= {share} on these examples", out=out).verdict
        assert verdict is not None
        assert (verdict.word, verdict.upper) == (word, survived / N)


@pytest.mark.parametrize(
    "claim", ["certified >= 0.5", "median >= 0.3", "median >= 2 x base", "detection >= 0.9 at fpr 0.05", "robust"]
)
def test_what_cannot_be_fed_is_refused_before_anything_is_written(tmp_path: Path, claim: str) -> None:
    with pytest.raises(ClaimError):
        evaluate(claim=claim, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_have_ended_early_gets_wider_bounds() -> None:
    record = evaluate(claim="accuracy >= 0.5")
    claim = claims.Claim.parse("accuracy >= 0.5")
    fixed, stopped = (claims.of_record(claim, record, stopped=s) for s in (False, True))
    assert fixed.upper is not None
    assert stopped.upper is not None
    assert fixed == record.verdict
    assert fixed.upper < stopped.upper
    assert "valid whenever one stops" in stopped.sentence
    part = claims.of_record(claims.Accuracy(0.5, here=True), record, total=10 * N)
    assert f"for all {10 * N}" in part.sentence
