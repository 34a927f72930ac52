"""Run directories: nothing half-written, nothing foreign touched, the same digest however often a run was cut."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_builder import build, fill, header

from mohs.errors import RecordError
from mohs.records import (
    Record,
    open_run,
)

TESTS = Path(__file__).parent


def snapshot(directory: Path) -> dict[str, bytes]:
    # The lock is left out: closing any handle on it would free it on POSIX systems.
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("records") / "run")


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
