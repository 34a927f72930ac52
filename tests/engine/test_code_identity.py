"""A verdict is bound to the code of its model, graded by the checks, and says whether its attacks adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mohs
from mohs import defenses, records
from mohs.cli import screen
from mohs.errors import ClaimError, RecordError
from mohs.evaluation import claims, replay
from mohs.evaluation.plans import Plan, PlanStep
from mohs.reports import page, plain

N, EPS = 24, 0.05
PLAN = Plan("one", (PlanStep.make("PGD", {"steps": 5}),))


class Linear(nn.Module):
    """Class 1 where the mean is above a threshold, which is no weight."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.gain = nn.Parameter(torch.tensor(8.0))
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        z = self.gain * (x.flatten(1).mean(1) - self.threshold)
        return torch.stack([-z, z], 1)


def data() -> tuple[Tensor, Tensor]:
    """Inputs whose mean lies 0.3 beside 0.5 on either side."""
    x = torch.full((N, 6), 0.2)
    x[::2] = 0.8
    return x, (x.mean(1) > 0.5).long()


def run(model: nn.Module, out: Path | None = None, **more: Any) -> records.Record:
    """A short evaluation of claim 'accuracy >= 0.5'."""
    settings = {"plan": PLAN, "claim": "accuracy >= 0.5", "control": 4, "out": out, "batch": 8} | more
    return mohs.evaluate(model.eval(), data(), f"linf:{EPS}", **settings)


def test_a_finished_record_is_not_that_of_other_code(tmp_path: Path) -> None:
    weak, strong = Linear(0.21), Linear(0.5)
    assert run(weak, tmp_path).robust_accuracy == 0.5  # the lower half of the inputs crosses 0.21
    with pytest.raises(RecordError, match=r"holds another run \(code: \w{12} there, \w{12} here\)"):
        run(strong, tmp_path)
    assert run(strong).robust_accuracy == 1.0


def test_the_same_model_is_resumed_whatever_it_counted(tmp_path: Path) -> None:
    model = Linear(0.5)
    first = run(model, tmp_path)
    assert model.asked > 2
    again = run(model, tmp_path)
    assert again.header.identity == first.header.identity == run(Linear(0.5), tmp_path).header.identity
    assert len(first.header.subject.code_sha256) == 64


def test_replay_and_diff_tell_other_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(Linear(0.21), tmp_path / "a")
    same, other = replay(record, Linear(0.21).eval()), replay(record, Linear(0.5).eval())
    assert (same.same_model, same.same_weights, same.same_code, same.holds) == (True, True, True, True)
    assert (other.same_model, other.same_weights, other.same_code, other.holds) == (False, True, False, False)
    screen.replayed(record, other)
    assert "on OTHER code than the recorded one." in capsys.readouterr().out
    assert [name for name, _, _ in records.diff(record, run(Linear(0.5), tmp_path / "b")).headers] == ["code"]
    elsewhere = record.header.model_copy(deep=True)
    elsewhere.environment.python = "3.1.4"
    record.header = elsewhere
    told = replay(record, Linear(0.5).eval())
    assert (told.same_code, told.same_model) == (None, True), "another Python compiles to other bytecode"


def test_the_report_names_code_grade_and_gradients() -> None:
    record = run(Linear(0.5))
    code = record.header.subject.code_sha256
    text, shown = plain.text(record), page.html(record)
    assert f"code      {code[:16]}" in text
    assert f"sha256 {code}" in shown
    assert record.verdict is not None
    assert f"UPHELD SO FAR, grade {record.verdict.grade}" in text
    assert f"upheld so far, grade {record.verdict.grade}" in shown
    assert "with what defenses declare" in shown


def test_a_record_without_a_hash_supports_no_claim() -> None:
    record = run(Linear(0.5))
    record.header = record.header.model_copy(deep=True)
    record.header.subject.code_sha256 = ""
    with pytest.raises(ClaimError, match="holds no hash of the model's code"):
        claims.of_record(claims.Accuracy(0.5), record)


@pytest.mark.parametrize("warned", [0, 1, 2])
def test_the_grade_is_that_of_the_checks(warned: int) -> None:
    names = ["curves", "restarts"][:warned]
    said = claims.judge("accuracy >= 0.5", claims.Counts(threat="linf:0.1", n=100, survived=90, warned=names))
    bare = claims.judge("accuracy >= 0.5", claims.Counts(threat="linf:0.1", n=100, survived=90))
    assert (said.word, said.exit_code, said.grade, bare.grade) == ("upheld so far", 0, "AB"[warned > 0], "")
    more = [
        " Grade A: every check that ran is quiet.",
        " Grade B: this check warns: curves.",
        " Grade B: these checks warn: curves, restarts.",
    ]
    assert said.sentence == bare.sentence + more[warned]
    for survived in (10, 52):
        other = claims.judge(
            "accuracy >= 0.5", claims.Counts(threat="linf:0.1", n=100, survived=survived, warned=names)
        )
        assert (other.grade, "Grade" in other.sentence) == ("", False)


def test_an_evaluation_grades_what_it_upholds() -> None:
    record = run(Linear(0.5))
    warned = [f.name for f in record.header.checks if f.severity == "warn"]
    assert record.verdict is not None
    assert (record.verdict.word, record.verdict.grade) == ("upheld so far", "B" if warned else "A")
    wrong = run(Linear(0.5), stated_accuracy=0.9)  # a check warns that it is another
    loud = [f.name for f in wrong.header.checks if f.severity == "warn"]
    assert loud
    assert wrong.verdict is not None
    assert (wrong.verdict.word, wrong.verdict.grade, wrong.verdict.exit_code) == ("upheld so far", "B", 0)
    assert all(name in wrong.verdict.sentence for name in loud)


class Steps(nn.Module):
    """Rounds its input, so that its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Linear(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(torch.round(x * 100) / 100)
        return out


@pytest.mark.parametrize("model", [defenses.BitDepth(4)(Linear(0.5)), Steps()])
def test_attacks_that_did_not_adapt_uphold_nothing(model: nn.Module) -> None:
    off, honest = run(model, adaptive="off"), run(Linear(0.5), adaptive="off")
    assert off.verdict is not None
    assert honest.verdict is not None
    assert (off.verdict.word, off.verdict.exit_code) in (("undecided", 11), ("blocked", 12))
    assert any("not adapted to this model" in text for text in off.header.limits)
    assert honest.verdict.word == "upheld so far"
    assert not any("not adapted" in text for text in honest.header.limits)
    assert (off.header.adaptive, honest.header.adaptive, run(model).header.adaptive) == ("off", "off", "declared")
    assert "not adaptive: gradients are taken as the model gives them" in page.html(off)


def test_naive_attacks_may_refute() -> None:
    said = claims.judge(
        "accuracy >= 0.5", claims.Counts(threat="linf:0.1", n=100, survived=10, naive="it declares JPEG")
    )
    kept = claims.judge(
        "accuracy >= 0.5", claims.Counts(threat="linf:0.1", n=100, survived=90, naive="it declares JPEG")
    )
    assert (said.word, kept.word) == ("refuted", "undecided")
    assert kept.sentence.startswith("Undecided: the attacks were not adapted to the model (it declares JPEG)")


def test_how_gradients_were_sought_is_part_of_what_differs(tmp_path: Path) -> None:
    run(Linear(0.5), tmp_path)
    with pytest.raises(RecordError, match="adaptive: declared there, blind here"):
        run(Linear(0.5), tmp_path, adaptive="blind")
    assert np.isfinite(records.Record.load(tmp_path).robust_accuracy)
