"""Claims parse or are refused with the reason; verdicts keep their stated error rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from mohs.errors import CertificateContradicted, ClaimError, UsageError
from mohs.evaluation.claims import Accuracy, Claim, verdict
from mohs.records import Verdict
from mohs.records.stats import lower_bound, upper_bound

THREAT = "linf:8/255"


def word(claim: str, n: int, survived: int, certified: int | None = None, **settings: Any) -> str:
    return verdict(claim, n, survived, certified, threat=THREAT, **settings).word


class TestParse:
    @pytest.mark.parametrize(
        "text",
        [
            "accuracy >= 0.6", "accuracy >= 60%", "accuracy>=60 %", "robust accuracy at least 0.6", "accuracy => 0.6",
            "  Robust\tAccuracy >= .6 ", "ACCURACY ≥ 0.60", "robust accuracy at least 60.0%", "accuracy >= 6e-1",
            "accuracy >= +0.6",
        ],
    )  # fmt: skip
    def test_forms(self, text: str) -> None:
        assert Claim.parse(text) == Accuracy(0.6)

    @given(st.floats(min_value=1e-9, max_value=1))
    def test_text_and_back(self, tau: float) -> None:
        assert Claim.parse(str(Accuracy(tau))).tau == tau

    @given(st.integers(min_value=1, max_value=1000))
    def test_a_percentage_is_the_same_number_as_the_share(self, thousandths: int) -> None:
        assert Claim.parse(f"accuracy >= {thousandths / 10}%") == Claim.parse(f"accuracy >= {thousandths / 1000}")

    def test_a_claim_passes_through(self) -> None:
        claim = Accuracy(0.5)
        assert Claim.parse(claim) is claim

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("the model is robust", "names no number"),
            ("", "names no number"),
            ("robust against all attacks", "nobody can try all attacks"),
            ("accuracy >= high", "no number"),
            ("accuracy >= 60", "Was 60% meant"),
            ("accuracy >= 0,6", "decimal comma"),
            ("accuracy > 0.6", "'more than'"),
            ("accuracy above 60%", "'more than'"),
            ("accuracy <= 0.6", "upper limit"),
            ("attack success rate at most 10%", "upper limit"),
            ("accuracy about 0.6", "'about'"),
            ("accuracy ~ 60%", "'about'"),
            ("clean accuracy >= 0.9", "without an adversary"),
            ("robustness >= 0.6", "does not say what is counted"),
            ("accuracy >= 0.6 and 0.7", "not of a form"),
            ("accuracy 0.6", "not of a form"),
            ("accuracy >= 0", "above 0"),
            ("accuracy >= -0.5", "above 0"),
            ("accuracy >= 150%", "above 0 and at most 1"),
            ("accuracy >= nan", "no number"),
            ("accuracy >= inf", "no number"),
            ("accuracy >= 1e999", "no number"),
        ],
    )
    def test_refused_with_the_reason_and_the_forms(self, text: str, reason: str) -> None:
        with pytest.raises(ClaimError) as caught:
            Claim.parse(text)
        assert reason in str(caught.value)
        assert "Allowed: 'accuracy >= 0.6'" in str(caught.value)
        assert caught.value.exit_code == 2

    @given(st.text(max_size=40))
    def test_nothing_else_is_ever_raised(self, text: str) -> None:
        try:
            claim = Claim.parse(text)
        except ClaimError:
            return
        assert 0 < claim.tau <= 1


class TestVerdict:
    @pytest.mark.parametrize(
        ("n", "survived", "expected"),
        # the exact limits at which 90% is refuted or upheld, one-sided 95%
        [(1000, 883, "refuted"), (1000, 884, "undecided"), (1000, 915, "undecided"), (1000, 916, "upheld so far"),
         (100, 84, "refuted"), (100, 85, "undecided"), (200, 172, "refuted"), (500, 438, "refuted"),
         (500, 439, "undecided"),
         (100, 95, "undecided"), (100, 96, "upheld so far"), (0, 0, "undecided"), (1, 0, "undecided")],
    )  # fmt: skip
    def test_limits(self, n: int, survived: int, expected: str) -> None:
        assert word("accuracy >= 90%", n, survived) == expected

    def test_stricter_alpha_moves_the_limit(self) -> None:
        assert word("accuracy >= 0.9", 100, 81, alpha=0.01) == "refuted"
        assert word("accuracy >= 0.9", 100, 82, alpha=0.01) == "undecided"

    def test_certified(self) -> None:
        assert word("accuracy >= 0.9", 1000, 950, 916) == "certified"
        assert word("accuracy >= 0.9", 1000, 950, 915) == "upheld so far"
        assert word("accuracy >= 0.9", 1000, 900, 880) == "undecided"
        assert word("accuracy >= 0.9", 1000, 880, 870) == "refuted"

    def test_everything_is_needed_to_certify_all(self) -> None:
        assert word("accuracy >= 100%", 1000, 1000, 1000) == "undecided"
        assert word("accuracy >= 100%", 1000, 999, 999) == "refuted"

    @pytest.mark.parametrize(("survived", "certified"), [(100, 0), (1000, 1000), (950, None)])
    def test_a_check_blocks_whatever_the_counts(self, survived: int, certified: int | None) -> None:
        answer = verdict(
            "accuracy >= 0.9", 1000, survived, certified, ["training mode", "inputs and box"], threat=THREAT
        )
        assert (answer.word, answer.exit_code) == ("blocked", 12)
        assert "training mode, inputs and box" in answer.sentence
        assert answer.lower is None
        assert answer.upper is None

    def test_exit_codes(self) -> None:
        counts = {"refuted": (800, 0), "certified": (990, 980), "upheld so far": (990, 0), "undecided": (900, 0)}
        codes = {w: verdict("accuracy >= 0.9", 1000, *c, threat=THREAT).exit_code for w, c in counts.items()}
        assert codes == {"refuted": 10, "certified": 0, "upheld so far": 0, "undecided": 11}
        assert {w: word("accuracy >= 0.9", 1000, *c) for w, c in counts.items()} == {w: w for w in counts}

    def test_bounds_are_of_the_truth(self) -> None:
        answer = verdict("accuracy >= 0.9", 1000, 950, 800, threat=THREAT)
        assert isinstance(answer, Verdict)
        assert answer.lower == lower_bound(800, 1000)
        assert answer.upper == upper_bound(950, 1000)
        assert verdict("accuracy >= 0.9", 1000, 950, threat=THREAT).lower is None

    @pytest.mark.parametrize("survived", [300, 600, 650])
    @pytest.mark.parametrize("certified", [None, 10, 200])
    def test_the_sentence_has_n_interval_threat_and_upper_bound(self, survived: int, certified: int | None) -> None:
        answer = verdict("accuracy >= 0.6", 1000, survived, certified, threat=THREAT)
        for text in (
            "n = 1000",
            THREAT,
            "upper bound",
            f"{survived} of",
            f"{upper_bound(survived, 1000):.2%}",
            "60%",
            "95%",
        ):
            assert text in answer.sentence
        assert ("certified" in answer.sentence) == (certified is not None)
        assert answer.sentence.lower().startswith(answer.word)
        assert answer.sentence.endswith(".")

    @given(st.integers(1, 400), st.data())
    def test_never_both_and_monotone(self, n: int, data: st.DataObject) -> None:
        survived = data.draw(st.integers(0, n))
        certified = data.draw(st.integers(0, survived))
        tau = data.draw(st.floats(0.01, 1))
        answer = verdict(Accuracy(tau), n, survived, certified, threat=THREAT)
        assert answer.lower is not None
        assert answer.upper is not None
        assert answer.lower <= answer.upper
        order = ["refuted", "undecided", "upheld so far", "certified"]
        more = verdict(Accuracy(tau), n, min(survived + 1, n), certified, threat=THREAT)
        assert order.index(more.word) >= order.index(answer.word)

    def test_refusals(self) -> None:
        with pytest.raises(CertificateContradicted, match=r"60 of 100 examples are certified .* only 50"):
            verdict("accuracy >= 0.5", 100, 50, 60, threat=THREAT)
        with pytest.raises(UsageError, match="counts"):
            verdict("accuracy >= 0.5", 100, 101, threat=THREAT)
        with pytest.raises(UsageError, match="probabilistic_failure"):
            verdict("accuracy >= 0.5", 100, 50, 40, threat=THREAT, probabilistic_failure=1.0)
        with pytest.raises(UsageError, match="alpha"):
            verdict("accuracy >= 0.5", 100, 50, threat=THREAT, alpha=0.0)


class TestErrorRates:
    """A true claim is refuted, and a false one certified, with probability at most alpha."""

    @pytest.mark.parametrize("n", [10, 50, 200])
    @pytest.mark.parametrize("tau", [0.05, 0.5, 0.6, 0.9, 0.99])
    @pytest.mark.parametrize("alpha", [0.05, 0.01])
    def test_exactly(self, n: int, tau: float, alpha: float) -> None:
        counts = np.arange(n + 1)
        words = [word(str(Accuracy(tau)), n, int(k), int(k), alpha=alpha) for k in counts]
        chance = binom.pmf(
            counts, n, tau
        )  # the hardest truth: exactly as claimed, and attack and certificate are perfect
        refuted = float(chance[[w == "refuted" for w in words]].sum())
        certified = float(chance[[w == "certified" for w in words]].sum())
        assert refuted <= alpha + 1e-9
        assert certified <= alpha + 1e-9

    def test_the_rates_are_used_up(self) -> None:
        counts = np.arange(501)
        words = [word("accuracy >= 0.5", 500, int(k)) for k in counts]
        chance = binom.pmf(counts, 500, 0.5)
        assert 0.03 < float(chance[[w == "refuted" for w in words]].sum()) <= 0.05

    def test_by_simulation_with_imperfect_attacks_and_certificates(self) -> None:
        rng = np.random.default_rng(0)
        n, runs, truth = 120, 3000, 0.7
        robust = rng.random((runs, n)) < truth
        survived = robust | (rng.random((runs, n)) < 0.1)  # the attack misses some
        proven = robust & (rng.random((runs, n)) < 0.9)  # the certificate misses some
        counts = np.stack([survived.sum(1), proven.sum(1)], 1)
        cache: dict[tuple[int, int, float], str] = {}
        for tau, wrong in ((0.7, "refuted"), (0.70001, "certified")):
            hits = 0
            for a, c in counts.tolist():
                key = (a, c, tau)
                if key not in cache:
                    cache[key] = word(str(Accuracy(tau)), n, a, c)
                hits += cache[key] == wrong
            assert hits / runs <= 0.05

    @pytest.mark.parametrize("failure", [0.001, 0.05, 0.2])
    def test_certificates_that_may_err(self, failure: float) -> None:
        n, truth, alpha = 200, 0.7, 0.05
        counts = np.arange(n + 1)
        # the worst case: all robust inputs certified, and of the others as many as the failure probability allows
        chance = binom.pmf(counts, n, truth + (1 - truth) * failure)
        claim = str(Accuracy(truth + 1e-6))
        hits = [word(claim, n, n, int(k), probabilistic_failure=failure, alpha=alpha) == "certified" for k in counts]
        assert float(chance[hits].sum()) <= alpha
        naive = [word(claim, n, n, int(k), alpha=alpha) == "certified" for k in counts]
        if failure == 0.2:
            assert float(chance[naive].sum()) > alpha  # so the correction is needed

    def test_a_probabilistic_certificate_may_exceed_the_survivors(self) -> None:
        assert word("accuracy >= 0.9", 1000, 950, 951, probabilistic_failure=0.001) == "certified"
