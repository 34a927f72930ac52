"""Header and ledger: what is written is read back, completely or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from record_builder import build, examples, header, one_result

from mohs.errors import RecordError
from mohs.records import (
    CertificateRows,
    Claim,
    Finding,
    Ledger,
    Results,
    identity_of,
)


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
