"""Evaluations of a part of the examples: those that decide a claim, those that were sealed, and models that reject."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_problem import conv, images, short_plan
from torch import Tensor, nn

import mohs
from mohs import records
from mohs.data import Dataset
from mohs.defenses import RejectDisagreement
from mohs.errors import ClaimError, DataError, ThreatError, UsageError
from mohs.evaluation import Plan, PlanStep, Seal, _stages, replay
from mohs.evaluation._order import shuffled
from mohs.evaluation._stages import Evaluation, Settings
from mohs.threat import Threat

BATCH, TOTAL = 16, 160
THREAT = "linf:0.05"


def data(n: int = TOTAL) -> Dataset:
    return images().take(n)


def judged(claim: str, out: Path | None = None, n: int = TOTAL, **given: Any) -> records.Record:
    settings: dict[str, Any] = {"plan": short_plan(4, 1), "batch": BATCH, "control": 4, "until": "decided", **given}
    return mohs.evaluate(conv(), data(n), THREAT, claim=claim, out=out, **settings)


class TestUntilDecided:
    def test_a_false_claim_ends_early_with_the_bounds_of_a_sequence(self, tmp_path: Path) -> None:
        record = judged("accuracy >= 0.95", tmp_path / "run")
        assert record.verdict is not None
        assert record.verdict.word == "refuted"
        assert record.n < TOTAL == record.header.data.n
        _, high = records.confidence_sequence(int(record.survived.sum()), record.n, 0.05, 1)
        assert record.verdict.upper == pytest.approx(high)
        assert record.interval()[1] == pytest.approx(
            records.confidence_sequence(int(record.survived.sum()), record.n, 0.05, 2)[1]
        )
        assert any(f"after {record.n} of {TOTAL}" in line for line in record.header.limits)
        assert all(len(record.results(a)) <= record.n for a in record.attacks)

    def test_what_cannot_be_decided_goes_to_the_end(self) -> None:
        whole = judged("accuracy >= 0.95")
        near = f"accuracy >= {whole.robust_accuracy:.2f}"
        record = judged(near, n=40)
        assert record.n == 40
        assert record.verdict is not None
        assert record.verdict.word == "undecided"

    def test_the_order_depends_on_content_and_seed_alone(self) -> None:
        first = data(60)
        other = first.take(indices=list(reversed(range(60))))
        a, b = first.take(indices=shuffled(first, 3)), other.take(indices=shuffled(other, 3))
        assert a.ids == b.ids
        assert torch.equal(a.y, b.y)
        assert a.ids != first.take(indices=shuffled(first, 4)).ids
        assert sorted(a.ids) == sorted(first.ids)

    def test_blocks_agree_with_the_run_to_the_end_on_whole_plans(self) -> None:
        # short_plan cuts no portions, so an example's answer cannot depend on its block
        record = judged("accuracy >= 0.95", control=0)
        ordered = data().take(indices=shuffled(data(), 0)).take(record.n)
        whole = mohs.evaluate(conv(), ordered, THREAT, plan=short_plan(4, 1), batch=BATCH, control=0)
        assert record.survived.tolist() == whole.survived.tolist()

    def test_it_goes_on_where_it_was_interrupted(self, tmp_path: Path) -> None:
        clean = judged("accuracy >= 0.7", tmp_path / "a")
        blocks = 0

        def stop(stage: str, done: int, total: int, broken: int) -> None:
            nonlocal blocks
            blocks += stage.startswith("3/3") and done == 0
            if blocks == 2 and stage.startswith("3/3"):
                raise KeyboardInterrupt

        if clean.n > BATCH:
            with pytest.raises(KeyboardInterrupt):
                judged("accuracy >= 0.7", tmp_path / "b", notify=stop)
        again = judged("accuracy >= 0.7", tmp_path / "b")
        assert again.digest() == clean.digest()
        assert again.verdict == clean.verdict
        assert again.n == clean.n

    def test_a_claim_about_these_examples_counts_those_that_were_not_seen(self) -> None:
        record = judged("accuracy >= 0.95 on these examples")
        assert record.verdict is not None
        assert record.verdict.word == "refuted"
        assert record.verdict.upper is not None
        # what was not seen may all be robust
        assert record.verdict.upper * TOTAL >= int(record.survived.sum())

    @pytest.mark.parametrize(("batch", "n"), [(1, 5), (1, 8), (3, 10), (16, 16), (16, 17), (16, 160)])
    def test_blocks_cover_every_example_once(self, batch: int, n: int) -> None:
        settings = Settings(0, batch, 0, until="decided")
        run = Evaluation(conv(), data(n), *data(n), Threat.parse(THREAT), short_plan(), None, [], settings, None)
        assert [i for block in run._blocks() for i in block] == list(range(n))

    def test_what_follows_the_plan_opens_no_further_block(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # a plan so weak that the checks after it find more, killed there: the second sitting ends where the first did
        weak = Plan("weak", (PlanStep.make("PGD", {"steps": 2, "step_size": 0.005}),))
        given: dict[str, Any] = {"plan": weak, "control": 8, "adaptive": "declared"}
        claim = "accuracy >= 0.35"
        whole = judged(claim, tmp_path / "a", **given)
        assert len(whole.header.plan.steps) > 1, "else nothing followed the plan"
        assert whole.header.ended_at == whole.n < TOTAL

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(_stages, "loss_curves", die)
            with pytest.raises(KeyboardInterrupt):
                judged(claim, tmp_path / "b", **given)
        again = judged(claim, tmp_path / "b", **given)
        assert (again.n, again.verdict, again.digest()) == (whole.n, whole.verdict, whole.digest())

    def test_equal_examples_do_not_stand_together(self) -> None:
        doubled = data(30).take(indices=[i % 10 for i in range(30)])
        order = [doubled.ids[i] for i in shuffled(doubled, 0)]
        assert sorted(order) == sorted(doubled.ids)
        assert sum(a == b for a, b in itertools.pairwise(order)) < 10

    def test_without_a_claim_there_is_nothing_to_decide(self) -> None:
        with pytest.raises(UsageError, match="needs a claim"):
            mohs.evaluate(conv(), data(), THREAT, until="decided")
        with pytest.raises(UsageError, match="'end' or 'decided'"):
            mohs.evaluate(conv(), data(), THREAT, until="dusk")  # type: ignore[arg-type]


class TestSealed:
    def test_only_the_sealed_examples_are_seen_and_the_look_is_listed(self, tmp_path: Path) -> None:
        sealed = Seal.of(data(), 20).write(tmp_path / "seal.json")
        assert Seal.read(tmp_path / "seal.json") == sealed
        given: dict[str, Any] = {"plan": short_plan(2, 1), "batch": BATCH, "control": 0, "seal": sealed}
        record = mohs.evaluate(conv(), data(), THREAT, out=tmp_path / "a", **given)
        assert record.examples.hash.tolist() == [data().ids[i] for i in sealed.indices]
        assert record.header.sealed is not None
        assert record.header.sealed.look == 1
        again = mohs.evaluate(conv(), data(), THREAT, out=tmp_path / "a", **given)
        assert again.header.sealed == record.header.sealed, "the same run sees the same again"
        second = mohs.evaluate(conv(), data(), THREAT, out=tmp_path / "elsewhere" / "b", **given)
        assert second.header.sealed is not None
        assert second.header.sealed.look == 2
        assert [look.who for look in records.read_looks(records.looks_of(tmp_path / "seal.json"))] == [
            "mohs.evaluate"
        ] * 2

    def test_other_examples_do_not_open_it(self, tmp_path: Path) -> None:
        sealed = Seal.of(data(), 5).write(tmp_path / "seal.json")
        forged = replace(sealed, indices=tuple(reversed(sealed.indices)))
        with pytest.raises(DataError, match="do not fit the commitment"):
            mohs.evaluate(conv(), data(), THREAT, out=tmp_path / "a", seal=forged)
        with pytest.raises(DataError, match="other inputs or labels"):
            mohs.evaluate(conv(), (1 - data().x, data().y), THREAT, out=tmp_path / "a", seal=sealed)
        assert not records.looks_of(tmp_path / "seal.json").exists()
        assert not (tmp_path / "a").exists()

    def test_a_look_needs_a_place_to_be_written_down(self) -> None:
        with pytest.raises(UsageError, match="give out="):
            mohs.evaluate(conv(), data(), THREAT, seal=Seal.of(data(), 5))

    def test_bad_files(self, tmp_path: Path) -> None:
        path = tmp_path / "seal.json"
        with pytest.raises(DataError, match="cannot be read"):
            Seal.read(path)
        path.write_text('{"indices": [1, 1]}')
        with pytest.raises(DataError, match="no seal"):
            Seal.read(path)
        with pytest.raises(DataError, match="exists"):
            Seal.of(data(4), 2).write(path)
        with pytest.raises(DataError, match="1 to 4"):
            Seal.of(data(4), 5)

    def test_to_end_early_they_are_shuffled(self, tmp_path: Path) -> None:
        # whoever sealed them chose their order; the bounds need one that nobody chose
        by_class = sorted(range(TOTAL), key=lambda i: int(data().y[i]))
        sealed = Seal.closed(data(), by_class, "a salt that is long enough").write(tmp_path / "seal.json")
        record = judged("accuracy >= 0.95", tmp_path / "a", seal=sealed)
        assert record.n < TOTAL
        assert len(set(record.examples.label.tolist())) > 3

    def test_a_record_that_was_made_without_the_seal_takes_it_and_keeps_it(self, tmp_path: Path) -> None:
        sealed = Seal.closed(data(), range(20), "a salt that is long enough").write(tmp_path / "seal.json")
        given: dict[str, Any] = {"plan": short_plan(2, 1), "batch": BATCH, "control": 0}
        out = tmp_path / "a"
        bare = mohs.evaluate(conv(), data(20), THREAT, out=out, **given)
        assert bare.header.sealed is None
        mohs.evaluate(conv(), data(), THREAT, out=out, seal=sealed, **given)
        noted = records.load_header(out).sealed
        assert noted is not None
        assert noted.commitment == sealed.commitment

        def stop(stage: str, done: int, total: int, broken: int) -> None:
            if stage.startswith("3/3"):
                raise KeyboardInterrupt

        # the same of a run that was interrupted, and goes on with the seal, then without
        out = tmp_path / "b"
        with pytest.raises(KeyboardInterrupt):
            mohs.evaluate(conv(), data(20), THREAT, out=out, notify=stop, **given)
        with pytest.raises(KeyboardInterrupt):
            mohs.evaluate(conv(), data(), THREAT, out=out, notify=stop, seal=sealed, **given)
        assert records.load_header(out).sealed is not None
        ended = mohs.evaluate(conv(), data(20), THREAT, out=out, **given)
        assert ended.header.sealed is not None
        assert ended.header.sealed.look == 2


class Wary(nn.Module):
    """A net that rejects what it is unsure of: the last logit is the lead it demands over the runner-up."""

    def __init__(self, lead: float) -> None:
        super().__init__()
        self.net, self.lead = conv(), lead

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.cat([z, z.topk(2, 1).values[:, 1:] + self.lead], 1)


class TestRejection:
    def test_to_be_rejected_is_no_success_and_no_right_answer(self) -> None:
        given: dict[str, Any] = {"plan": short_plan(8, 1), "batch": BATCH, "control": 0}
        plain = mohs.evaluate(conv(), data(80), THREAT, **given)
        wary = mohs.evaluate(Wary(0.5).eval(), data(80), THREAT, reject=-1, **given)
        naive = mohs.evaluate(Wary(0.5).eval(), data(80), THREAT, **given)
        assert wary.header.subject.reject == 10
        assert wary.header.subject.classes == 10
        assert wary.header.data.class_names[-1] == "rejected"
        rejected = wary.examples.clean_label == 10
        assert rejected.sum() > 0
        assert not wary.correct[rejected].any()
        assert (wary.examples.clean_margin[wary.correct] > 0.5).all(), "to the nearest class, not to the rejection"
        assert wary.clean_accuracy < plain.clean_accuracy
        # accepted wrong answers are harder to reach than any change of the answer
        assert wary.survived.sum() > naive.survived.sum()
        for attack in wary.attacks:
            rows = wary.results(attack)
            assert (rows.label_after[rows.success] < 10).all(), "a success must be accepted"
        assert replay(wary, Wary(0.5).eval()).holds
        # the same points, scored as if rejection were a class, need not all be wrong for the demanding net
        assert not replay(wary, Wary(50.0).eval()).holds

    def test_defenses_declare_it(self) -> None:
        twin = copy.deepcopy(conv())
        with torch.no_grad():
            twin[0].weight.mul_(1.02)
        net = RejectDisagreement()(conv(), twin).eval()
        record = mohs.evaluate(net, data(32), THREAT, plan=short_plan(4, 1), batch=BATCH, control=0)
        assert record.header.subject.reject == 10
        assert record.robust_accuracy < record.clean_accuracy

    @pytest.mark.parametrize(("index", "said"), [(11, "Allowed: 0 to 10"), (3, "must be the last logit")])
    def test_which_logit(self, index: int, said: str) -> None:
        with pytest.raises(UsageError, match=said):
            mohs.evaluate(Wary(0.5).eval(), data(8), THREAT, reject=index)

    def test_what_counts_as_survived_is_said(self) -> None:
        record = mohs.evaluate(
            Wary(0.5).eval(),
            data(24),
            THREAT,
            reject=-1,
            plan=short_plan(2, 1),
            batch=BATCH,
            control=0,
            claim="accuracy >= 0.1",
        )
        assert record.verdict is not None
        assert "rejected once changed" in record.verdict.sentence
        assert any("unchanged inputs are rejected" in line for line in record.header.limits)
        with pytest.raises(ClaimError, match="may reject"):
            mohs.evaluate(Wary(0.5).eval(), data(8), THREAT, reject=-1, claim="stability >= 0.5")

    def test_the_exam_cannot_hide_anything_in_it(self) -> None:
        with pytest.raises(ThreatError, match="Leave the exam out"):
            mohs.evaluate(Wary(0.5).eval(), data(8), THREAT, reject=10, exam=4)
