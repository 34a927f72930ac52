"""Claims on other things than accuracy: how they parse, what evidence they need, how it weighs, and with which error rates."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_builder import build
from scipy.stats import binom

from mohs.errors import CertificateContradicted, ClaimError, UsageError
from mohs.evaluation import (
    Accuracy,
    Certified,
    Claim,
    Counts,
    Detection,
    Detections,
    Evidence,
    Median,
    Scores,
    Sizes,
    Stability,
    judge,
)
from mohs.evaluation.claims import of_record, require
from mohs.records import Record, clopper_pearson, lower_bound, mean_bounds, median_interval, upper_bound

THREAT = "linf:8/255"
ORDER = ["refuted", "undecided", "upheld so far", "certified"]


def counts(n: int, survived: int, **more: Any) -> Counts:
    return Counts(threat=THREAT, n=n, survived=survived, **more)


def sizes(values: Any, **more: Any) -> Sizes:
    return Sizes(threat="linf:inf", sizes=values, **more)


class TestParse:
    @pytest.mark.parametrize(
        ("text", "claim"),
        [
            ("stability >= 60%", Stability(0.6)),
            ("Prediction stability at least 0.6", Stability(0.6)),
            ("certified >= 0.5", Certified(0.5)),
            ("certified accuracy ≥ 50 %", Certified(0.5)),
            ("accuracy >= 0.6 on these examples", Accuracy(0.6, here=True)),
            ("stability >= 60% on these examples", Stability(0.6, here=True)),
            ("median >= 0.3", Median(0.3)),
            ("median distortion at least 8/255", Median(8 / 255)),
            ("median >= 1e-2", Median(0.01)),
            ("median >= 2 x runs/Base", Median(2.0, of="runs/Base")),
            ("median >= 1.5 times the plain net", Median(1.5, of="the plain net")),
            ("detection >= 0.9 at fpr 0.05", Detection(0.9, fpr=0.05)),
            ("detection rate at least 90% at a false-positive rate of 5%", Detection(0.9, fpr=0.05)),
            ("Detection >= 90 % at FPR 5 %", Detection(0.9, fpr=0.05)),
        ],
    )
    def test_forms(self, text: str, claim: Claim) -> None:
        assert Claim.parse(text) == claim
        assert Claim.parse(str(claim)) == claim

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("accuracy >= 0.6 against all attacks", "nobody can try all attacks"),
            ("secure against every adversary", "nobody can try all attacks"),
            ("very stable", "names no number"),
            ("stability >= 60", "Was 60% meant"),
            ("stability > 0.6", "'more than'"),
            ("certified >= all", "no number"),
            ("certified >= 0.5 on those examples", "not of a form"),
            ("median >= 0", "above 0"),
            ("median >= 5%", "not of a form"),
            ("median >= 8/0", "no number"),
            ("median >= 8/", "no number"),
            ("median <= 0.3", "upper limit"),
            ("median >= large", "no number"),
            ("mean distortion >= 0.3", "claim the median"),
            ("detection >= 0.9", "flags everything"),
            ("detection >= 0.9 at fpr 0", "between 0 and 1"),
            ("detection >= 0.9 at fpr 5", "Was 5% meant"),
            ("detection >= 0.9 at tpr 0.1", "flags everything"),
            ("size >= 0.3", "does not say what is counted"),
        ],
    )
    def test_refused_with_the_reason_and_an_example(self, text: str, reason: str) -> None:
        with pytest.raises(ClaimError) as caught:
            Claim.parse(text)
        assert reason in str(caught.value)
        assert "'accuracy >= 0.6'" in str(caught.value)

    @given(st.floats(min_value=1e-6, max_value=1e6))
    def test_medians_to_text_and_back(self, size: float) -> None:
        assert Claim.parse(str(Median(size))) == Median(size)
        assert Claim.parse(str(Median(size, of="b"))) == Median(size, of="b")

    def test_without_a_threat_nothing_is_tested(self) -> None:
        for kind in (Counts(threat="x", n=1, survived=1), sizes([1.0])):
            with pytest.raises(ClaimError, match="tested against a threat"):
                type(kind)(**{**vars(kind), "threat": " "})


EVIDENCE: dict[type[Evidence], Evidence] = {
    Counts: counts(10, 5, certified=3),
    Scores: Scores(threat=THREAT, scores=[0.5] * 10),
    Sizes: sizes([0.1] * 10),
    Detections: Detections(threat=THREAT, attacked=10, detected=5, clean=10, flagged=0),
}
CLAIMS = [Accuracy(0.6), Stability(0.6), Certified(0.6), Median(0.3), Detection(0.9, 0.05)]


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
@pytest.mark.parametrize("kind", EVIDENCE, ids=lambda kind: kind.__name__)
class TestEvidence:
    def test_a_claim_takes_the_evidence_it_names_and_no_other(self, claim: Claim, kind: type[Evidence]) -> None:
        if kind in claim.evidence:
            assert judge(claim, EVIDENCE[kind]).word in ORDER
            assert kind.__name__ in claim.needs
        else:
            with pytest.raises(ClaimError, match=rf"needs .*; got {kind.__name__}\."):
                judge(claim, EVIDENCE[kind])

    def test_a_check_blocks_and_nothing_tried_upholds_nothing(self, claim: Claim, kind: type[Evidence]) -> None:
        if kind not in claim.evidence:
            return
        content = vars(EVIDENCE[kind])
        blocked = judge(claim, kind(**content | {"blocked": ["training mode"]}))
        assert (blocked.word, blocked.exit_code, blocked.lower, blocked.upper) == ("blocked", 12, None, None)
        assert "training mode" in blocked.sentence
        untried = judge(claim, kind(**content | {"untried": ["no attack fits"]}))
        assert untried.word in ("undecided", "refuted", "certified")

    def test_sentences_begin_with_the_word(self, claim: Claim, kind: type[Evidence]) -> None:
        if kind not in claim.evidence:
            return
        answer = judge(claim, EVIDENCE[kind])
        assert answer.sentence.lower().startswith(answer.word)
        assert EVIDENCE[kind].threat in answer.sentence
        assert "n = 10" in answer.sentence
        assert answer.sentence.endswith(".")


class TestStability:
    def test_counts_as_accuracy_does(self) -> None:
        for survived in range(0, 101, 5):
            one, other = (judge(c, counts(100, survived)) for c in (Stability(0.6), Accuracy(0.6)))
            assert (one.word, one.upper) == (other.word, other.upper)
        assert "stay the same" in judge(Stability(0.6), counts(100, 10)).sentence

    def test_what_was_not_attacked_upholds_nothing_and_refutes_nothing(self) -> None:
        assert judge(Stability(0.6), counts(100, 90)).word == "upheld so far"
        answer = judge(Stability(0.6), counts(100, 90, unattacked=30))
        assert (answer.word, answer.upper) == ("undecided", upper_bound(90, 100))
        assert "30 of which no attack was tried on" in answer.sentence
        assert judge(Stability(0.6), counts(100, 45, unattacked=45)).word == "refuted"

    def test_of_a_record(self, tmp_path: Path) -> None:
        record = Record.load(build(tmp_path / "run"))
        wrong, survived = int((~record.correct).sum()), int(record.survived.sum())
        assert wrong > 0
        answer = of_record(Stability(0.99), record)
        assert answer.upper == upper_bound(survived + wrong, record.n)
        assert f"{wrong} of which no attack" in answer.sentence
        assert of_record(Accuracy(0.99), record).upper == upper_bound(survived, record.n)


class TestCertified:
    def test_is_a_count_of_proofs(self) -> None:
        assert judge("certified >= 0.5", counts(1000, 900, certified=540)).word == "certified"
        assert judge("certified >= 0.5", counts(1000, 900, certified=510)).word == "undecided"
        refuted = judge("certified >= 0.5", counts(1000, 900, certified=400))
        assert (refuted.word, refuted.upper) == ("refuted", upper_bound(400, 1000))
        assert "40%" in refuted.sentence

    def test_never_upheld_by_attacks_that_failed(self) -> None:
        words = {judge("certified >= 0.5", counts(100, 100, certified=c)).word for c in range(101)}
        assert words == {"refuted", "undecided", "certified"}

    def test_needs_a_certificate(self) -> None:
        with pytest.raises(ClaimError, match="no certificate ran"):
            judge("certified >= 0.5", counts(100, 90))


class TestOneTestSet:
    @pytest.mark.parametrize(
        ("tau", "total"), [(0.6, 10), (0.07, 100), (0.29, 100), (0.9, 1000), (1.0, 7), (0.57, 100)]
    )
    def test_exact_once_all_were_tested(self, tau: float, total: int) -> None:
        needed = math.ceil(Fraction(str(tau)) * total)  # in decimals, as it was written
        claim = Accuracy(tau, here=True)
        for stopped in (False, True):
            below, at = (judge(claim, counts(total, k, total=total, stopped=stopped)) for k in (needed - 1, needed))
            assert (below.word, at.word) == ("refuted", "upheld so far")
        assert judge(claim, counts(total, needed, certified=needed, total=total)).word == "certified"
        assert "these are all there are" in at.sentence

    def test_refuted_as_soon_as_too_many_are_broken_whatever_alpha(self) -> None:
        claim = Accuracy(0.6, here=True)
        for n, broken, word in ((41, 41, "refuted"), (99, 41, "refuted"), (99, 40, "upheld so far")):
            for stopped in (False, True):
                answer = judge(claim, counts(n, n - broken, total=100, stopped=stopped, alpha=1e-9))
                assert (answer.word == "refuted") == (word == "refuted"), (n, broken, stopped)

    def test_says_how_many_there_are(self) -> None:
        answer = judge("accuracy >= 0.6 on these examples", counts(50, 20, total=80))
        assert "on these examples" in answer.sentence
        assert "bounds for all 80" in answer.sentence

    def test_the_size_belongs_to_such_a_claim_only(self) -> None:
        with pytest.raises(ClaimError, match="need the size"):
            judge(Accuracy(0.6, here=True), counts(10, 5))
        with pytest.raises(ClaimError, match="must not have"):
            judge(Accuracy(0.6), counts(10, 5, total=20))

    def test_of_a_record(self, tmp_path: Path) -> None:
        record = Record.load(build(tmp_path / "run"))
        share = int(record.survived.sum()) / record.n
        assert of_record(Accuracy(share, here=True), record).word == "upheld so far"
        assert of_record(Accuracy(share + 1e-9, here=True), record).word == "refuted"


class TestScores:
    def test_bounds_are_those_of_the_mean(self) -> None:
        scores = np.random.default_rng(0).binomial(5, 0.7, 300) / 5
        low, high = mean_bounds(scores, sides=1)
        assert judge(Accuracy(low - 0.01), Scores(threat=THREAT, scores=scores)).word == "upheld so far"
        assert judge(Accuracy((low + high) / 2), Scores(threat=THREAT, scores=scores)).word == "undecided"
        answer = judge(Accuracy(high + 0.01), Scores(threat=THREAT, scores=scores))
        assert (answer.word, answer.upper) == ("refuted", high)
        assert f"{scores.mean():.2%}"[:4] in answer.sentence

    def test_draws_are_no_examples(self) -> None:
        # 20 examples, each always right or never: the binomial bound over all 20 x 50 draws would be far too narrow
        scores = np.random.default_rng(0).permutation([1.0] * 13 + [0.0] * 7)
        naive = clopper_pearson(13 * 50, 20 * 50, sides=1)
        low, high = mean_bounds(scores, sides=1)
        assert low < 0.5 < naive[0]
        assert judge(Accuracy(0.7), Scores(threat=THREAT, scores=scores)).word == "undecided"
        assert naive[1] < 0.7 < high

    def test_none_decide_nothing_and_speak_of_no_test_set(self) -> None:
        assert judge("accuracy >= 0.6", Scores(threat=THREAT)).word == "undecided"
        with pytest.raises(ClaimError, match="one test set"):
            judge(Accuracy(0.6, here=True), Scores(threat=THREAT, scores=[0.5]))
        with pytest.raises(UsageError, match=r"\[0, 1\]"):
            judge("accuracy >= 0.6", Scores(threat=THREAT, scores=[3.0]))


class TestMedian:
    VALUES = np.concatenate([np.linspace(0.1, 0.5, 80), np.full(20, np.inf)])

    def test_bounds_are_order_statistics(self) -> None:
        low, high = median_interval(self.VALUES, sides=1)
        for tau, word in (
            (low, "upheld so far"),
            ((low + high) / 2, "undecided"),
            (high, "undecided"),
            (high + 1e-6, "refuted"),
        ):
            assert judge(Median(tau), sizes(self.VALUES)).word == word

    def test_certified_radii_prove(self) -> None:
        radii = 0.9 * np.where(np.isinf(self.VALUES), 0.5, self.VALUES)
        proven = median_interval(radii, sides=1)[0]
        answer = judge(Median(proven), sizes(self.VALUES, radii=radii))
        assert (answer.word, answer.lower) == ("certified", proven)
        assert judge(Median(proven + 0.01), sizes(self.VALUES, radii=radii)).word == "upheld so far"

    def test_what_was_not_looked_for_is_not_upheld(self) -> None:
        nothing = np.full(100, np.inf)
        assert judge(Median(0.3), sizes(nothing)).word == "upheld so far"
        assert judge(Median(0.3), sizes(nothing, reach=0.3)).word == "upheld so far"
        assert judge(Median(0.3), sizes(nothing, reach=0.2)).word == "undecided"

    def test_few_examples_decide_nothing(self) -> None:
        for n in range(5):
            assert judge(Median(0.3), sizes([0.1] * n)).word == "undecided"
        assert judge(Median(0.3), sizes([0.1] * 5)).word == "refuted"  # 1/32 < 0.05

    def test_a_ratio_is_refuted_by_certificates_of_the_baseline_only(self) -> None:
        claim, other = Median(2.0, of="base"), np.full(100, 0.2)
        found = np.full(100, 0.3)
        answer = judge(claim, sizes(found, baseline=sizes(other)))
        assert answer.word == "undecided"
        assert "if the attacks had found the smallest changes of the baseline" in answer.sentence
        proven = sizes(other, radii=np.full(100, 0.16))
        assert judge(claim, sizes(found, baseline=proven)).word == "refuted"
        assert judge(claim, sizes(found, baseline=sizes(other, radii=np.full(100, 0.14)))).word == "undecided"

    def test_a_ratio_is_upheld_and_proven_against_what_was_found_of_the_baseline(self) -> None:
        claim, base = Median(2.0, of="base"), sizes(np.full(100, 0.2))
        assert judge(claim, sizes(np.full(100, 0.4), baseline=base)).word == "upheld so far"
        assert judge(claim, sizes(np.full(100, 0.39), baseline=base)).word == "undecided"
        assert judge(claim, sizes(np.full(100, 0.5), radii=np.full(100, 0.4), baseline=base)).word == "certified"
        endless = sizes(np.full(100, np.inf))
        assert judge(claim, sizes(np.full(100, np.inf), baseline=endless)).word == "undecided"

    def test_both_medians_share_the_error_rate(self) -> None:
        values = np.arange(1.0, 41.0)
        halves = median_interval(values, 0.025, 1)
        base = sizes(np.full(40, 1.0), radii=np.full(40, 1.0))
        assert judge(Median(halves[0], of="b"), sizes(values, baseline=base)).word == "upheld so far"
        assert judge(Median(halves[0] + 1e-9, of="b"), sizes(values, baseline=base)).word == "undecided"
        assert judge(Median(halves[1] + 1e-9, of="b"), sizes(values, baseline=base)).word == "refuted"

    def test_refusals(self) -> None:
        with pytest.raises(ClaimError, match="has no baseline"):
            judge(Median(0.3), sizes([0.1], baseline=sizes([0.1])))
        with pytest.raises(ClaimError, match="baseline"):
            judge(Median(2.0, of="b"), sizes([0.1]))
        for wrong in ([-0.1], [math.nan], [[0.1]]):
            with pytest.raises(UsageError, match="numbers >= 0"):
                sizes(wrong)
        with pytest.raises(UsageError, match="one number >= 0 per size"):
            sizes([0.1, 0.2], radii=[0.1])
        with pytest.raises(CertificateContradicted, match="1 of 2"):
            sizes([0.1, 0.2], radii=[0.11, 0.2])


class TestDetection:
    CLAIM = Detection(0.9, fpr=0.05)

    def word(self, detected: int, flagged: int, attacked: int = 1000, clean: int = 1000) -> str:
        seen = Detections(threat=THREAT, attacked=attacked, detected=detected, clean=clean, flagged=flagged)
        return judge(self.CLAIM, seen).word

    def test_both_must_hold(self) -> None:
        assert self.word(950, 30) == "upheld so far"
        assert self.word(950, 50) == "undecided"  # the rate of false alarms is not clear
        assert self.word(950, 70) == "refuted"  # it is clear, and too high
        assert self.word(900, 30) == "undecided"
        assert self.word(870, 30) == "refuted"
        assert self.word(1000, 1000) == "refuted"  # that flags everything
        assert self.word(0, 0, 0, 0) == "undecided"

    def test_error_rates_exactly(self) -> None:
        n = 200
        k = np.arange(n + 1)
        hits, alarms = binom.pmf(k, n, 0.9), binom.pmf(k, n, 0.05)
        words = {(d, f): self.word(d, f, n, n) for d in range(150, n + 1, 1) for f in range(0, 31)}
        refuted = sum(hits[d] * alarms[f] for (d, f), w in words.items() if w == "refuted")
        assert refuted <= 0.05  # exactly as claimed
        # one of both is false by next to nothing, the other true by far
        quiet, sharp = binom.pmf(k, n, 0.001), binom.pmf(k, n, 0.999)
        assert sum(hits[d] * quiet[f] for (d, f), w in words.items() if w == "upheld so far") <= 0.05
        assert sum(sharp[d] * alarms[f] for (d, f), w in words.items() if w == "upheld so far") <= 0.05

    def test_refusals(self) -> None:
        with pytest.raises(UsageError, match="detected=11"):
            Detections(threat=THREAT, attacked=10, detected=11, clean=1, flagged=0)


class TestRequire:
    def test_what_an_evaluation_cannot_feed_is_refused_with_the_way_out(self) -> None:
        for text, way in (
            ("certified >= 0.5", "certificates="),
            ("median >= 0.3", "minimum_norm"),
            ("median >= 2 x base", "minimum_norm"),
            ("detection >= 0.9 at fpr 0.05", "Detections"),
        ):
            with pytest.raises(ClaimError, match="needs") as caught:
                require(Claim.parse(text), [])
            assert way in str(caught.value)
        require(Claim.parse("certified >= 0.5"), [object()])
        for text in ("accuracy >= 0.6", "stability >= 0.6", "accuracy >= 0.6 on these examples"):
            require(Claim.parse(text), [])

    def test_certified_of_a_record(self, tmp_path: Path) -> None:
        record = Record.load(build(tmp_path / "run"))
        assert record.certified is not None
        answer = of_record(Certified(0.01), record)
        assert answer.lower == lower_bound(int(record.certified.sum()), record.n)
