"""Records: nothing half-written, nothing foreign touched, and the same digest however often a run was cut."""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from record_builder import build, examples, fill, header, picture

from mohs.errors import RecordError, UsageError
from mohs.records import (
    CertificateRows,
    Claim,
    Examples,
    Finding,
    Ledger,
    Record,
    Results,
    clopper_pearson,
    diff,
    identity_of,
    lower_bound,
    mcnemar,
    open_run,
    upper_bound,
)

TESTS = Path(__file__).parent


def one_result(example: int = 0, success: bool = True, **changes: float) -> Results:
    row = {
        "example": example,
        "success": success,
        "size": 0.03,
        "margin": -1.0,
        "restart": 0,
        "label_after": 1,
        "confidence_after": 0.9,
        "forwards": 10,
        "backwards": 10,
        "queries": 10,
    }
    return Results(**(row | changes))


def snapshot(directory: Path) -> dict[str, bytes]:
    # The lock is left out: closing any handle on it would free it on POSIX systems.
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("records") / "run")


# ---- the header ------------------------------------------------------------------------------------------


def test_header_survives_json_with_infinite_radius() -> None:
    before = header(threat={"region": "l2", "eps": math.inf}, curve=[])
    after = type(before).model_validate_json(before.model_dump_json())
    assert after.subject == before.subject
    assert after.created == before.created
    assert float(after.threat["eps"]) == math.inf


def test_header_refuses_unknown_fields() -> None:
    content = json.loads(header().model_dump_json()) | {"surprise": 1}
    with pytest.raises(ValidationError, match="surprise"):
        type(header()).model_validate(content)


def test_severity_is_one_of_four() -> None:
    with pytest.raises(ValidationError):
        Finding(id="A1", name="x", severity="fatal", saw="y")  # type: ignore[arg-type]


def test_claim_needs_a_share() -> None:
    with pytest.raises(ValidationError):
        Claim(text="accuracy >= 60", tau=60)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_identity_ignores_order_and_sees_every_value(parts: dict[str, object]) -> None:
    assert identity_of(parts) == identity_of(dict(reversed(parts.items())))
    assert identity_of(parts) != identity_of(parts | {"one more": 1})


# ---- the ledger ------------------------------------------------------------------------------------------


def test_everything_written_is_read_back(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.sqlite", "me") as ledger:
        listed = examples(5)
        ledger.put_examples(listed)
        x = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 2, 2)
        ledger.put_results(2, one_result(3, size=0.5, margin=math.nan), {3: x}, {3: x.astype(np.float64)})
        ledger.put_results(2, one_result(1, success=False, size=math.inf))
        ledger.put_trace(2, 3, 1, [1.0, 0.5, -0.25])
        ledger.put_certificates("IBP", CertificateRows([0, 4], [True, False], [math.inf, math.nan]))
        ledger.add_seconds(2, 1.5)
        ledger.add_seconds(2, 0.25)
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.identity == "me"
        assert ledger.examples().hash.tolist() == listed.hash.tolist()
        assert ledger.examples().control.dtype == np.bool_
        assert ledger.answered(2).tolist() == [1, 3]
        assert ledger.answered(0).tolist() == []
        rows = ledger.results(2)
        assert rows.success.tolist() == [False, True]
        assert rows.size.tolist() == [math.inf, 0.5]
        assert np.isnan(rows.margin[1])
        ids, points = ledger.points(2)
        assert ids.tolist() == [3]
        assert points.dtype == np.float32
        assert (points[0] == x).all()
        assert ledger.inputs([3])[1].dtype == np.float64
        assert ledger.traces()[0][:3] == (2, 3, 1)
        assert ledger.traces()[0][3].tolist() == [1.0, 0.5, -0.25]
        proved = ledger.certificates()["IBP"]
        assert proved.radius[0] == math.inf
        assert np.isnan(proved.radius[1])
        assert ledger.seconds() == {2: 1.75}


def test_a_closed_ledger_is_one_plain_file(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == [".lock", "ledger.sqlite", "record.json"]


def test_a_batch_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.sqlite") as ledger:
        ledger.put_examples(examples(4))
        x = np.zeros((1, 2, 2), np.float32)
        ledger.put_results(0, one_result(2), {2: x}, {2: x})
        before = ledger.digest()
        both = Results([1, 2], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [1, 1], [1, 1], [1, 1])
        with pytest.raises(RecordError, match="answered twice"):
            ledger.put_results(0, both, {1: x, 2: x}, {1: x})
        with pytest.raises(RecordError, match="unknown"):
            ledger.put_results(0, one_result(77, success=False))
        assert ledger.digest() == before
        assert ledger.answered(0).tolist() == [2]


def test_successes_need_point_and_input(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.sqlite") as ledger:
        ledger.put_examples(examples(4))
        x = np.zeros((1, 2, 2), np.float32)
        with pytest.raises(RecordError, match="row 2 differ"):
            ledger.put_results(0, one_result(2))
        with pytest.raises(RecordError, match="row 3 differ"):
            ledger.put_results(0, one_result(3, success=False), {3: x}, {3: x})
        with pytest.raises(RecordError, match="row 2 have a point but no clean input"):
            ledger.put_results(0, one_result(2), {2: x})
        ledger.put_results(0, one_result(2), {2: x}, {2: x})
        ledger.put_results(1, one_result(2), {2: x})  # the input is known by now


def test_columns_must_be_equally_long() -> None:
    with pytest.raises(RecordError, match="equally long"):
        CertificateRows([1, 2], [True], [0.1, 0.2])


def test_other_examples_are_refused(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.sqlite") as ledger:
        ledger.put_examples(examples(4))
        ledger.put_examples(examples(4))
        changed = examples(4)
        changed.hash[2] = "other"
        with pytest.raises(RecordError, match="row 2"):
            ledger.put_examples(changed)


def test_digest_sees_every_cell_but_no_seconds(tmp_path: Path) -> None:
    x = np.zeros((1, 2, 2), np.float32)

    def digest(name: str, row: Results, value: float = 0.0, seconds: float = 1.0, reverse: bool = False) -> str:
        with Ledger.create(tmp_path / name) as ledger:
            ledger.put_examples(examples(4))
            writes = [
                lambda: ledger.put_results(0, row, {1: x + np.float32(value)}, {1: x}),
                lambda: ledger.put_results(0, one_result(2, success=False)),
            ]
            for write in reversed(writes) if reverse else writes:
                write()
            ledger.add_seconds(0, seconds)
            return ledger.digest()

    base = digest("a", one_result(1))
    assert digest("b", one_result(1), seconds=9.0) == base
    assert digest("c", one_result(1), reverse=True) == base
    assert digest("d", one_result(1), value=1e-7) != base
    for i, name in enumerate(("size", "margin", "restart", "label_after", "forwards", "queries")):
        assert digest(f"e{i}", one_result(1, **{name: 5})) != base


def test_digest_sees_every_table(tmp_path: Path) -> None:
    x = np.zeros((1, 2, 2), np.float32)
    with Ledger.create(tmp_path / "l.sqlite") as ledger:
        seen = [ledger.digest()]
        for write in (
            lambda: ledger.put_examples(examples(4)),
            lambda: ledger.put_results(0, one_result(0, success=False)),
            lambda: ledger.put_results(0, one_result(1), {1: x}, {1: x}),
            lambda: ledger.put_trace(0, 1, 0, [1.0, 2.0]),
            lambda: ledger.put_trace(0, 1, 0, [1.0, 2.5]),
            lambda: ledger.put_certificates("IBP", CertificateRows(2, True, 0.1)),
        ):
            write()
            seen.append(ledger.digest())
        ledger.add_seconds(0, 3.0)
        assert ledger.digest() == seen[-1]
    assert len(set(seen)) == len(seen)


def test_full_disk_leaves_the_last_batch_intact(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "l.sqlite") as ledger:
        ledger.put_examples(examples(4))
        x = np.zeros((1, 2, 2), np.float32)
        ledger.put_results(0, one_result(1), {1: x}, {1: x})
        before = ledger.digest()
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count={pages + 1}")
        big = np.zeros((3, 100, 100), np.float32)
        with pytest.raises(RecordError, match=r"full.*intact.*issue the command again"):
            ledger.put_results(0, one_result(2), {2: big}, {2: big})
        assert ledger.digest() == before


# ---- the run directory -----------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(stops=st.lists(st.integers(0, 6), max_size=3), batch=st.integers(3, 20))
def test_interrupted_and_resumed_equals_uninterrupted(
    stops: list[int], batch: int, tmp_path_factory: pytest.TempPathFactory, finished: Path
) -> None:
    directory = tmp_path_factory.mktemp("resumed") / "run"
    for stop in stops:
        with open_run(directory, header()) as run:
            fill(run, batch=batch, stop=stop)
        assert Record.load(directory).header.status == "interrupted"
    with open_run(directory, header()) as run:
        fill(run, batch=batch)
        run.finish()
    assert Record.load(directory).header.ledger_digest == Record.load(finished).header.ledger_digest


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from record_builder import fill, header
from mohs.records import open_run
run = open_run(Path(sys.argv[1]), header())
fill(run, stop=4)
run.ledger._db.execute("BEGIN IMMEDIATE")
run.ledger._db.execute("DELETE FROM points")
os._exit(9)
"""


def test_a_killed_process_loses_only_its_open_batch(tmp_path: Path, finished: Path) -> None:
    directory = tmp_path / "run"
    code = subprocess.run([sys.executable, "-c", KILLED, str(directory), str(TESTS)], cwd=TESTS.parent).returncode
    assert code == 9
    partial = Record.load(directory)
    assert partial.header.status == "running"
    assert "running, not complete" in partial.describe()
    assert len(partial.results(0)) > 0
    with open_run(directory, header()) as run:
        assert run.resumed
        fill(run)
        run.finish()
    assert Record.load(directory).digest() == Record.load(finished).digest()


def test_two_processes_cannot_write_one_directory(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    code = KILLED.split("fill(run")[0]
    with open_run(directory, header()):
        with pytest.raises(RecordError, match="another process"):
            open_run(directory, header())
        done = subprocess.run(
            [sys.executable, "-c", code, str(directory), str(TESTS)],
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
        )
        assert "RecordError" in done.stderr
        assert "another process" in done.stderr
        assert Record.load(directory).header.status == "running"  # readers are welcome meanwhile
    with open_run(directory, header()) as run:
        assert run.resumed


def test_a_start_killed_before_its_header_can_start_again(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with open_run(directory, header()):
        pass
    (directory / "record.json").unlink()
    with open_run(directory, header(seed=3)) as run:
        assert not run.resumed
        assert run.ledger.identity == header(seed=3).identity


@pytest.mark.parametrize("names", [["thesis.tex"], ["ledger.sqlite"], [".lock", "thesis.tex"]])
def test_foreign_directories_are_not_touched(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RecordError, match="Nothing was changed"):
        open_run(tmp_path, header())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RecordError, match="is a file"):
        open_run(tmp_path / "out", header())
    with pytest.raises(RecordError):
        open_run(tmp_path / "out" / "deeper", header())


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    directory = build(tmp_path / "run", n=12)
    before = snapshot(directory)
    with pytest.raises(RecordError, match=r"seed: 0 there, 7 here.*another --out") as caught:
        open_run(directory, header(12, seed=7))
    assert caught.value.exit_code == 2
    assert "model" not in str(caught.value)
    other = header(12, threat_text="linf:4/255", threat={"region": "linf", "eps": 4 / 255})
    with pytest.raises(RecordError, match=r"threat: linf:8/255 there, linf:4/255 here"):
        open_run(directory, other)
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("record.json", b'{"schema_version": 1, "stat', "damaged or cut short"),
        ("record.json", b"[]", "schema version None"),
        ("record.json", b'{"schema_version": 99}', "schema version 99"),
        ("record.json", b'{"schema_version": 1}', "identity"),
        ("record.json", b"\xff\xfe", "damaged"),
        ("ledger.sqlite", b"not a database at all" * 100, "damaged or cut short"),
        ("ledger.sqlite", b"", "not a ledger"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    directory = build(tmp_path / "run", n=8)
    (directory / name).write_bytes(content)
    before = snapshot(directory)
    for reading in (lambda: Record.load(directory), lambda: open_run(directory, header(8))):
        with pytest.raises(RecordError, match=says) as caught:
            reading()
        assert name in str(caught.value)
    assert snapshot(directory) == before


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_truncated_ledger_is_damaged(tmp_path: Path, kept: float) -> None:
    directory = build(tmp_path / "run", n=30)
    ledger = directory / "ledger.sqlite"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(RecordError, match="damaged or cut short"):
        Record.load(directory)


def test_missing_and_swapped_ledgers(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a", n=8), build(tmp_path / "b", n=8, seed=1)
    os.replace(b / "ledger.sqlite", a / "ledger.sqlite")
    with pytest.raises(RecordError, match="different runs"):
        Record.load(a)
    with pytest.raises(RecordError, match="another run"):
        open_run(a, header(8))
    with pytest.raises(RecordError, match="missing"):
        Record.load(b)
    with pytest.raises(RecordError, match=r"no .*record.json"):
        Record.load(tmp_path / "nowhere")


def test_a_changed_row_is_found(tmp_path: Path) -> None:
    directory = build(tmp_path / "run", n=20)
    Record.load(directory).verify()
    db = sqlite3.connect(directory / "ledger.sqlite")
    db.execute("UPDATE results SET success = 0 WHERE success = 1")
    db.commit()
    db.close()
    with pytest.raises(RecordError, match="changed after the run"):
        Record.load(directory).verify()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_header_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with open_run(tmp_path / "run", header()) as run:
        before = (run.dir / "record.json").read_bytes()

        def refuse(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(RecordError, match=r"cannot write record.json"):
                run.update(seed=5)
        assert (run.dir / "record.json").read_bytes() == before
        assert not list(run.dir.glob("*.tmp")) + list(run.dir.glob(".*.tmp"))
        assert run.header.seed == 0


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RecordError, match=r"not accessible.*another --out"):
        open_run(tmp_path / "run", header())


def test_a_record_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    directory = build(tmp_path / "run", n=10)
    before = snapshot(directory)
    for path in directory.iterdir():
        path.chmod(0o444)
    directory.chmod(0o555)
    try:
        record = Record.load(directory)
        record.verify()
        assert record.n == 10
        if os.geteuid() != 0:  # the superuser may write anyway
            with pytest.raises(RecordError, match="not accessible"):
                open_run(directory, header(10))
    finally:
        directory.chmod(0o755)
    assert snapshot(directory) == before


def test_update_checks_before_it_writes(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", header()) as run:
        with pytest.raises(RecordError, match="status"):
            run.update(status="nearly")
        assert run.header.status == "running"


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


# ---- being a leaf ----------------------------------------------------------------------------------------


def test_records_are_a_leaf(finished: Path) -> None:
    code = (
        "import sys\n"
        "import types\n"
        "sys.modules['torch'] = None\n"
        "face = sys.modules['mohs'] = types.ModuleType('mohs')\n"  # the face may need torch, the leaf may not
        "face.__path__ = ['mohs']\n"
        "from mohs.records import Record\n"
        "print(Record.load(sys.argv[1]).describe())\n"
        "print(sorted(m for m in sys.modules if m.startswith('mohs')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    said, loaded = done.stdout.splitlines()
    assert "upper bound" in said
    others = [m for m in eval(loaded) if not m.startswith("mohs.records") and m not in ("mohs", "mohs.errors")]
    assert others == []
