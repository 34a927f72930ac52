"""Reading records: the bracket, exact statistics and the comparison of two records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_builder import build, examples, header, one_result, picture

from mohs.errors import RecordError, UsageError
from mohs.records import (
    CertificateRows,
    Examples,
    Ledger,
    Record,
    clopper_pearson,
    diff,
    lower_bound,
    mcnemar,
    open_run,
    upper_bound,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("records") / "run")


# ---- reading ---------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_bracket_is_that_of_a_naive_count(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(1, 6))
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    right, proved = data.draw(flags), data.draw(flags)
    broken = [data.draw(flags) for _ in range(2)]
    path = tmp_path_factory.mktemp("naive") / "l.sqlite"
    x = np.zeros((1, 1, 1), np.float32)
    with Ledger.create(path) as ledger:
        zeros = [0.0] * n
        ledger.put_examples(Examples(range(n), ["h"] * n, [1] * n, [1 if r else 0 for r in right], zeros, zeros, zeros))
        for attack, hits in enumerate(broken):
            for i in range(n):
                store = {i: x} if hits[i] else None
                ledger.put_results(attack, one_result(i, success=hits[i]), store, store)
        ledger.put_certificates("C", CertificateRows(range(n), proved, zeros))
        record = Record(path.parent, header(n), ledger)
    survived = [r and not (a or b) for r, a, b in zip(right, *broken)]
    assert record.survived.tolist() == survived
    assert record.robust_accuracy == pytest.approx(sum(survived) / n)
    assert record.clean_accuracy == pytest.approx(sum(right) / n)
    assert record.certified is not None
    assert record.certified.tolist() == [r and c for r, c in zip(right, proved)]
    assert record.contradicted.tolist() == [i for i in range(n) if right[i] and proved[i] and not survived[i]]
    assert record.breaker.tolist() == [0 if a else 1 if b else -1 for a, b in zip(*broken)]


def test_describe_never_leaves_anything_out(finished: Path) -> None:
    record = Record.load(finished)
    text = record.describe()
    low, high = clopper_pearson(int(record.survived.sum()), 40)
    for part in ("upper bound", "linf:8/255", "of 40", f"{low:.1%} to {high:.1%}", "certified"):
        assert part in text
    assert record.header.totals.survived == record.survived.sum()
    assert record.verdict is not None
    assert record.attack_name(3) == "Square"


def test_replay_needs_no_data_set(finished: Path) -> None:
    record = Record.load(finished)
    for attack in record.attacks:
        ids, points = record.points(attack)
        same, clean = record.inputs(ids)
        assert (same == ids).all()
        assert (ids == record.results(attack).example[record.results(attack).success]).all()
        if len(ids):
            assert np.abs(points - clean).max() <= 8 / 255 + 1e-6
            assert (clean[0] == picture(int(ids[0]), int(record.examples.label[ids[0]]), (1, 12, 12))).all()
    with pytest.raises(RecordError, match="no point or input for row 39999"):
        record.inputs([39999])
    with pytest.raises(RecordError, match="no rows of attack 9"):
        record.results(9)


def test_without_attacks_nothing_is_called_robust(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", header(4)) as run:
        run.ledger.put_examples(examples(4))
        assert run.record().describe().startswith("No attack ran")


def test_no_certificate_is_not_zero_certified(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", header(4)) as run:
        run.ledger.put_examples(examples(4))
        record = run.record()
        assert record.certified is None
        assert record.certified_accuracy is None
        with pytest.raises(RecordError, match="no interval"):
            record.interval("certified")
        assert run.finish().totals.certified is None


def test_empty_records_say_so(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", header(0)) as run:
        run.finish()
    record = Record.load(tmp_path / "run")
    assert math.isnan(record.robust_accuracy)
    assert "no examples" in record.describe()


# ---- statistics ------------------------------------------------------------------------------------------


def binomial_tail(k: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def test_known_intervals() -> None:
    # Figures in percent computed with independent software: the usual textbook cases.
    for k, n, low, high in (
        (900, 1000, 87.97, 91.79),
        (9000, 10000, 89.40, 90.58),
        (470, 1000, 43.87, 50.15),
    ):
        found = clopper_pearson(k, n)
        assert [round(100 * bound, 2) for bound in found] == [low, high]
    assert clopper_pearson(0, 100)[1] == pytest.approx(0.0362, abs=5e-5)


def test_closed_forms_at_the_ends() -> None:
    for n in (1, 7, 100):
        assert clopper_pearson(0, n) == (0.0, pytest.approx(1 - 0.025 ** (1 / n)))
        assert clopper_pearson(n, n) == (pytest.approx(0.025 ** (1 / n)), 1.0)
        assert upper_bound(0, n, 0.1) == pytest.approx(1 - 0.1 ** (1 / n))
        assert lower_bound(n, n, 0.1) == pytest.approx(0.1 ** (1 / n))
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@settings(deadline=None)
@given(n=st.integers(1, 60), share=st.floats(0, 1), alpha=st.floats(0.001, 0.5))
def test_bounds_solve_their_defining_equations(n: int, share: float, alpha: float) -> None:
    k = round(share * n)
    low, high = lower_bound(k, n, alpha), upper_bound(k, n, alpha)
    if k > 0:
        assert binomial_tail(k, n, low) == pytest.approx(alpha, rel=1e-6)
    if k < n:
        assert 1 - binomial_tail(k + 1, n, high) == pytest.approx(alpha, rel=1e-6)
    assert low <= k / n <= high


@pytest.mark.parametrize("p", [0.03, 0.5, 0.87])
def test_coverage_is_never_below_nominal(p: float) -> None:
    # Exact coverage: every outcome weighted with its probability.
    n = 40
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if clopper_pearson(k, n, 0.1)[0] <= p <= clopper_pearson(k, n, 0.1)[1]
    )
    assert 0.9 <= covered < 0.99


def test_thresholds_that_refute() -> None:
    for n, k in ((100, 84), (200, 172), (500, 438), (1000, 883)):
        assert upper_bound(k, n) < 0.9 <= upper_bound(k + 1, n)


def test_mcnemar_is_exact() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(0, 1074) == 2.0**-1073
    assert 0 < mcnemar(4000, 6000) < 1e-80


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_equals_the_binomial_test(b: int, c: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected)


@pytest.mark.parametrize("args", [(5, 4), (-1, 4), (1, 4, 0.0), (1, 4, 1.0), (1, 4, 0.05, 3), (0.5, 4)])
def test_senseless_counts_are_refused(args: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        clopper_pearson(*args)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        mcnemar(-1, 3)


# ---- diff ------------------------------------------------------------------------------------------------


def test_diff_matches_by_content(tmp_path: Path) -> None:
    def record(name: str, order: list[int], broken: set[int], weights: str) -> Record:
        first = header(len(order))
        subject = first.subject.model_copy(update={"weights_sha256": weights})
        x = np.zeros((1, 1, 1), np.float32)
        with open_run(tmp_path / name, header(len(order), subject=subject)) as run:
            k = len(order)
            hashes = [f"content {i}" for i in order]
            run.ledger.put_examples(Examples(range(k), hashes, [1] * k, [1] * k, [1.0] * k, [0.9] * k, [0] * k))
            for position, content in enumerate(order):
                hit = content in broken
                store = {position: x} if hit else None
                run.ledger.put_results(0, one_result(position, success=hit), store, store)
            run.finish()
        return Record.load(tmp_path / name)

    a = record("a", [0, 1, 2, 3, 4, 5], {0, 1}, "aa" * 32)
    b = record("b", [9, 5, 4, 3, 2, 1], {5, 4, 3}, "bb" * 32)
    found = diff(a, b)
    assert (found.shared, found.only_a, found.only_b) == (5, 1, 1)
    assert found.newly_broken.tolist() == [1, 2, 3]  # positions in b of contents 5, 4, 3
    assert found.newly_safe.tolist() == [5]
    assert (found.survived_a, found.survived_b) == (4, 2)
    assert found.p == mcnemar(3, 1)
    assert [name for name, _, _ in found.headers] == ["model"]
    assert "3 newly broken" in found.describe()
    assert diff(a, a).p == 1.0
    assert "differ in nothing" in diff(a, a).describe()
    c = record("c", [20, 21], set(), "aa" * 32)
    with pytest.raises(RecordError, match="no example in common"):
        diff(a, c)


def test_unlike_threats_are_not_compared(tmp_path: Path) -> None:
    a = Record.load(build(tmp_path / "a", n=8))
    b = Record.load(build(tmp_path / "b", n=8, threat={"region": "other"}, threat_text="l2:0.5"))
    with pytest.raises(RecordError, match=r"linf:8/255 .* l2:0.5"):
        diff(a, b)
