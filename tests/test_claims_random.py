"""Verdicts on random models: a break may be an error of its confirmation, and a true claim must still seldom be refuted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from mohs.errors import UsageError
from mohs.evaluation import claims
from mohs.evaluation.claims import Claim, Counts, decided, judge
from mohs.evaluation.confirmation import ALPHA
from mohs.records import SCORE, Draws

RUNS = 400
ROOM = 3 * np.sqrt(0.05 * 0.95 / RUNS)


def counts(n: int, survived: int, **settings: Any) -> Counts:
    return Counts(threat="t", n=n, survived=survived, error=ALPHA, **settings)


def refuted(claim: str, all_: list[Counts]) -> float:
    return float(np.mean([judge(claim, c).word == "refuted" for c in all_]))


@pytest.mark.parametrize("truth", [1.0, 0.998, 0.6])
def test_points_wrong_in_exactly_one_half_refute_a_true_claim_at_most_with_alpha(truth: float) -> None:
    n = 2000
    survived = binom.rvs(n, truth * (1 - ALPHA), size=RUNS, random_state=1).tolist()
    claim = f"accuracy >= {min(truth, 0.998)}"
    assert refuted(claim, [counts(n, k) for k in survived]) <= 0.05 + ROOM
    if truth >= 0.998:
        assert refuted(claim, [Counts(threat="t", n=n, survived=k) for k in survived]) > 0.5, (
            "or there is nothing to allow for"
        )
    assert judge(f"accuracy >= {truth}", counts(n, int(n * (truth - 0.05)))).word == "refuted"


@pytest.mark.parametrize("part", [400, 100])
def test_likewise_of_one_test_set(part: int) -> None:
    total, robust = 400, 300
    generator = np.random.default_rng(2)
    found = []
    for _ in range(RUNS):
        stays = np.arange(total) < robust
        stays &= generator.random(total) >= ALPHA
        found.append(counts(part, int(generator.permutation(stays)[:part].sum()), total=total))
    claim = f"accuracy >= {robust / total} on these examples"
    assert refuted(claim, found) <= 0.05 + ROOM
    if part == total:
        assert refuted(claim, [Counts(threat="t", n=total, survived=c.survived, total=total) for c in found]) > 0.5
    assert judge(claim, counts(part, int(0.6 * part), total=total)).word == "refuted"
    assert counts(0, 0, total=0).kept == 1


def test_the_bound_of_a_whole_test_set_is_the_exact_one() -> None:
    high = round(counts(50, 40, total=50).kept * 50)
    assert binom.cdf(40, high, 1 - ALPHA) > 0.05 >= binom.cdf(40, high + 1, 1 - ALPHA)


@pytest.mark.parametrize("total", [None, 512])
def test_likewise_whenever_one_stops(total: int | None) -> None:
    generator = np.random.default_rng(3)
    claim = "accuracy >= 0.99" + " on these examples" * (total is not None)
    wrong = 0
    for _ in range(RUNS // 5):
        stays = (generator.random(512) >= ALPHA).cumsum()
        looks = [counts(n, int(stays[n - 1]), stopped=True, total=total) for n in (32, 512)]
        wrong += any(judge(claim, c).word == "refuted" for c in looks)
    assert wrong <= (0.05 + ROOM) * RUNS / 5
    assert decided("accuracy >= 0.6", 100, 20, error=ALPHA)
    assert decided("accuracy >= 0.6", 100, 40)
    assert not decided("accuracy >= 0.6", 100, 40, error=0.2)


def record(draws: int, wrong_of_twenty: list[int] | None) -> Any:
    """Ten examples, of which three are wrong unchanged and two more were broken."""
    n = 10
    scored = [] if wrong_of_twenty is None else list(range(n))
    subject = SimpleNamespace(weights_sha256="ab", code_sha256="cd")
    return SimpleNamespace(
        header=SimpleNamespace(threat={"draws": draws}, threat_text="t", subject=subject), n=n, certified=None,
        correct=np.arange(n) >= 3, survived=np.arange(n) >= 5,
        draws=Draws(
            attack=np.full(len(scored), SCORE), example=np.array(scored, int), drawn=np.full(len(scored), 20),
            wrong=np.array(wrong_of_twenty or [], int),
        ),
    )  # fmt: skip


def test_a_verdict_of_a_record_says_which_score_is_judged() -> None:
    claim = Claim.parse("accuracy >= 0.6")
    verdict = claims.of_record(claim, record(20, [20, 16, 12, 0, 0, 0, 0, 0, 0, 0]))
    assert "majority vote" in verdict.sentence
    assert "error rate 0.01 per example" in verdict.sentence
    assert "6 of n = 10 examples survived" in verdict.sentence, "12 of 20 draws may be luck"
    assert "1 of which no attack was tried on" in verdict.sentence
    assert verdict.upper == counts(10, 6).kept > Counts(threat="t", n=10, survived=6).bounds(6)[1]
    assert "8 of n = 10" in claims.of_record(claim, record(20, None)).sentence, "no draw has confirmed it yet"
    certain = claims.of_record(claim, record(0, None))
    assert "majority" not in certain.sentence
    assert certain.upper == Counts(threat="t", n=10, survived=5).bounds(5)[1]


@pytest.mark.parametrize("error", [-0.1, 1.0])
def test_an_error_rate_is_a_probability(error: float) -> None:
    with pytest.raises(UsageError, match="error must lie in"):
        Counts(threat="t", n=1, survived=1, error=error)
