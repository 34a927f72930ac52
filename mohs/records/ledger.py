"""The ledger: one row per example and attack, in one SQLite file that survives being killed.

Everything a batch of work found is written in one transaction, so a run that is interrupted knows exactly
which rows are answered. Seconds are kept in a table of their own and stay out of `Ledger.digest`: a run that
was interrupted and resumed must have the same digest as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mohs.errors import RecordError, rows_text
from mohs.records import _files
from mohs.records.rows import CertificateRows, Draws, Examples, Results, hash_cell, pack, unpack

APPLICATION_ID = 0x4D6F6873  # "Mohs" in ASCII: tells our ledgers from other SQLite files
LEDGER_VERSION = 2

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE examples (
    id INTEGER PRIMARY KEY, hash TEXT NOT NULL, label INTEGER NOT NULL, clean_label INTEGER NOT NULL,
    clean_margin REAL, clean_confidence REAL, control INTEGER NOT NULL);
CREATE TABLE results (
    attack INTEGER, example INTEGER REFERENCES examples(id), success INTEGER NOT NULL, size REAL, margin REAL,
    restart INTEGER NOT NULL, label_after INTEGER NOT NULL, confidence_after REAL,
    forwards INTEGER NOT NULL, backwards INTEGER NOT NULL, queries INTEGER NOT NULL,
    PRIMARY KEY (attack, example));
CREATE TABLE draws (
    attack INTEGER, example INTEGER REFERENCES examples(id), drawn INTEGER NOT NULL, wrong INTEGER NOT NULL,
    PRIMARY KEY (attack, example));
CREATE TABLE points (
    attack INTEGER, example INTEGER, dtype TEXT NOT NULL, shape TEXT NOT NULL, blob BLOB NOT NULL,
    PRIMARY KEY (attack, example), FOREIGN KEY (attack, example) REFERENCES results(attack, example));
CREATE TABLE inputs (
    example INTEGER PRIMARY KEY REFERENCES examples(id), dtype TEXT NOT NULL, shape TEXT NOT NULL,
    blob BLOB NOT NULL);
CREATE TABLE nearest (
    example INTEGER PRIMARY KEY REFERENCES examples(id), margin REAL NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
    blob BLOB NOT NULL);
CREATE TABLE traces (
    attack INTEGER, example INTEGER REFERENCES examples(id), restart INTEGER, dtype TEXT NOT NULL,
    shape TEXT NOT NULL, blob BLOB NOT NULL, PRIMARY KEY (attack, example, restart));
CREATE TABLE certificates (
    name TEXT, example INTEGER REFERENCES examples(id), holds INTEGER NOT NULL, radius REAL,
    PRIMARY KEY (name, example));
CREATE TABLE seconds (attack INTEGER PRIMARY KEY, seconds REAL NOT NULL);
"""


Arrays = Mapping[int, NDArray[Any]]


class Ledger:
    """One SQLite file, one writer; every write is one transaction.

    Use `Ledger.create`, `Ledger.open` or, in an evaluation, the ledger of `open_run`.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    # ---- opening -------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, identity: str = "") -> Ledger:
        """Create a ledger for a run of this identity; an existing file is a RecordError."""
        path = Path(path)
        if path.exists():
            raise RecordError(f"a new ledger was asked for, but {path} exists. Open it or choose another place.")
        with _files.guard(path, "create the ledger"):
            db = _connect(path, write=True)
            try:
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={LEDGER_VERSION}")
                db.executescript(f"BEGIN;{_TABLES}COMMIT;")
                with _transaction(db):
                    db.execute("INSERT INTO meta VALUES ('identity', ?)", (identity,))
            except BaseException:
                db.close()
                for leftover in _files.sqlite_files(path):
                    leftover.unlink(missing_ok=True)
                raise
        return cls(path, db)

    @classmethod
    def open(cls, path: str | Path, write: bool = False, check: bool = True) -> Ledger:
        """Open an existing ledger; what is missing, foreign or damaged is a RecordError.

        Args:
            path: the SQLite file.
            write: open for writing.
            check: let SQLite look for damaged pages first.
        """
        path = Path(path)
        if not path.is_file():
            raise RecordError(
                f"the ledger {path} is missing; the record cannot be read without it. "
                "Restore the file, or run the evaluation again into another directory."
            )
        with _files.guard(path, "open the ledger"):
            db = _connect(path, write=False)  # a look changes nothing, whatever the file turns out to be
            try:
                _check_ours(db, path, check)
            except BaseException:
                db.close()
                raise
            if write:
                db.close()
                db = _connect(path, write=True)
        return cls(path, db)

    def close(self) -> None:
        """Close the file; a writer folds its journal in, so that one plain file is left."""
        with _files.guard(self.path, "close the ledger"):
            try:
                if not self._read_only():
                    self._db.execute("PRAGMA journal_mode=DELETE")
            except sqlite3.OperationalError:
                pass  # a reader looks at it right now: the journal stays and is read along
            finally:
                self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_only(self) -> bool:
        return bool(self._db.execute("PRAGMA query_only").fetchone()[0])

    @property
    def identity(self) -> str:
        """The identity of the run it was created for."""
        with _files.guard(self.path, "read the ledger"):
            row = self._db.execute("SELECT value FROM meta WHERE key='identity'").fetchone()
        return str(row[0]) if row else ""

    # ---- writing -------------------------------------------------------------------------------------

    def put_examples(self, examples: Examples) -> None:
        """Record the examples; those already there must be the same ones."""
        known = dict(self._read("SELECT id, hash FROM examples"))
        changed = [i for i, h in zip(examples.id.tolist(), examples.hash.tolist()) if known.get(i, h) != h]
        if changed:
            raise RecordError(
                f"{self.path} already holds other examples at {rows_text(changed)}. "
                "The data differ from those of the run: give the same data or another --out."
            )
        rows = [row for row in examples.as_rows() if row[0] not in known]
        with self._write():
            self._db.executemany("INSERT INTO examples VALUES (?,?,?,?,?,?,?)", rows)

    def put_results(
        self, attack: int, rows: Results, points: Arrays | None = None, inputs: Arrays | None = None,
        nearest: Arrays | None = None, draws: Draws | None = None,
    ) -> None:  # fmt: skip
        """Record what an attack found for some examples, all or nothing.

        Args:
            attack: its position in the plan.
            rows: one entry per example; an example may be answered only once by an attack.
            points: the adversarial input of each success, by example.
            inputs: the clean input of each example that has a point (replay needs no data set).
            nearest: points of examples that did not break, for later attacks to begin from; of each example the one of
                highest margin is kept until the run ends.
            draws: of a random model, what confirmed or refuted each success that the attack reported.
        """
        points, inputs = points or {}, inputs or {}
        won = set(rows.example[rows.success].tolist())
        if stray := sorted(set(points) ^ won):
            raise RecordError(
                f"attack {attack}: every success needs a point and nothing else may have one; "
                f"{rows_text(stray)} differ."
            )
        stored = set(self._ids("SELECT example FROM inputs"))
        if bare := sorted(won - set(inputs) - stored):
            raise RecordError(f"attack {attack}: {rows_text(bare)} have a point but no clean input; give `inputs`.")
        with self._write():
            self._db.executemany(
                "INSERT INTO results VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                ((attack, *row) for row in rows.as_rows()),
            )
            self._db.executemany(
                "INSERT INTO points VALUES (?,?,?,?,?)",
                ((attack, int(i), *pack(x)) for i, x in points.items()),
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO inputs VALUES (?,?,?,?)",
                ((int(i), *pack(x)) for i, x in inputs.items()),
            )
            if draws is not None:
                self._db.executemany("INSERT INTO draws VALUES (?,?,?,?)", draws.as_rows())
            if nearest:
                margins = dict(zip(rows.example.tolist(), rows.margin.tolist()))
                self._db.executemany(
                    "INSERT INTO nearest VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE SET margin=excluded.margin, "
                    "dtype=excluded.dtype, shape=excluded.shape, blob=excluded.blob WHERE excluded.margin > margin",
                    ((int(i), margins[int(i)], *pack(x)) for i, x in nearest.items()),
                )

    def put_draws(self, rows: Draws) -> None:
        """Record fresh draws of a random model, all or nothing."""
        with self._write():
            self._db.executemany("INSERT INTO draws VALUES (?,?,?,?)", rows.as_rows())

    def drop_nearest(self) -> None:
        """Forget the points of unbroken examples: the run is over."""
        with self._write():
            self._db.execute("DELETE FROM nearest")

    def put_trace(self, attack: int, example: int, restart: int, values: ArrayLike) -> None:
        """Record the objective after each step of one restart on one example."""
        packed = pack(np.asarray(values, dtype=np.float32))
        with self._write():
            self._db.execute("INSERT OR REPLACE INTO traces VALUES (?,?,?,?,?,?)", (attack, example, restart, *packed))

    def put_certificates(self, name: str, rows: CertificateRows) -> None:
        """Record what a certificate proved for some examples, all or nothing."""
        with self._write():
            self._db.executemany("INSERT INTO certificates VALUES (?,?,?,?)", ((name, *row) for row in rows.as_rows()))

    def add_seconds(self, attack: int, seconds: float) -> None:
        """Add to the wall-clock time of an attack; not part of the digest."""
        with self._write():
            self._db.execute(
                "INSERT INTO seconds VALUES (?,?) ON CONFLICT DO UPDATE SET seconds = seconds + excluded.seconds",
                (attack, float(seconds)),
            )

    # ---- reading -------------------------------------------------------------------------------------

    def answered(self, attack: int) -> NDArray[np.int64]:
        """Positions of the examples this attack has answered, ascending."""
        rows = self._ids("SELECT example FROM results WHERE attack=? ORDER BY example", attack)
        return np.asarray(rows, dtype=np.int64)

    def certified_by(self, name: str) -> NDArray[np.int64]:
        """Positions of the examples this certificate has answered, ascending."""
        rows = self._ids("SELECT example FROM certificates WHERE name=? ORDER BY example", name)
        return np.asarray(rows, dtype=np.int64)

    def examples(self) -> Examples:
        """All examples, by position."""
        return Examples.from_rows(self._read("SELECT * FROM examples ORDER BY id"))

    def attacks(self) -> list[int]:
        """Positions in the plan of the attacks that have rows."""
        return self._ids("SELECT DISTINCT attack FROM results ORDER BY attack")

    def results(self, attack: int) -> Results:
        """All rows of one attack, by example."""
        names = ",".join(field.name for field in fields(Results))
        rows = self._read(f"SELECT {names} FROM results WHERE attack=? ORDER BY example", attack)
        return Results.from_rows(rows)

    def draws(self) -> Draws:
        """All fresh draws of a random model, by attack and example; empty for another one."""
        return Draws.from_rows(self._read("SELECT * FROM draws ORDER BY attack, example"))

    def confirmations(self, attack: int, examples: Iterable[int]) -> NDArray[np.int64]:
        """Of a random model, how many attacks before this one had a success at each of the examples asked again, [M]."""
        wanted = [int(i) for i in examples]
        asked: Counter[int] = Counter()
        query = "SELECT example FROM draws WHERE attack=? AND example IN (SELECT value FROM json_each(?))"
        for earlier in range(attack):
            asked.update(self._ids(query, earlier, json.dumps(wanted)))
        return np.asarray([asked[i] for i in wanted], dtype=np.int64)

    def points(self, attack: int, examples: Iterable[int] | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The adversarial inputs an attack found: positions [M] and points [M, ...]."""
        ids = self._ids("SELECT example FROM points WHERE attack=? ORDER BY example", attack)
        query = "SELECT dtype, shape, blob FROM points WHERE attack=? AND example=?"
        return self._blobs(query, (attack,), ids, examples)

    def nearest(self, examples: Iterable[int] | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Points to begin from, of those of the examples that have one: positions [M] and points [M, ...]."""
        ids = self._ids("SELECT example FROM nearest ORDER BY example")
        wanted = ids if examples is None else sorted(set(examples) & set(ids))
        return self._blobs("SELECT dtype, shape, blob FROM nearest WHERE example=?", (), ids, wanted)

    def inputs(self, examples: Iterable[int] | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The stored clean inputs: positions [M] and inputs [M, ...]."""
        ids = self._ids("SELECT example FROM inputs ORDER BY example")
        return self._blobs("SELECT dtype, shape, blob FROM inputs WHERE example=?", (), ids, examples)

    def traces(self) -> list[tuple[int, int, int, NDArray[Any]]]:
        """All traces as (attack, example, restart, values [steps])."""
        rows = self._read("SELECT * FROM traces ORDER BY attack, example, restart")
        return [(a, e, r, unpack(dtype, shape, blob)) for a, e, r, dtype, shape, blob in rows]

    def certificates(self) -> dict[str, CertificateRows]:
        """What each certificate proved, by name."""
        names = [row[0] for row in self._read("SELECT DISTINCT name FROM certificates ORDER BY name")]
        query = "SELECT example, holds, radius FROM certificates WHERE name=? ORDER BY example"
        return {name: CertificateRows.from_rows(self._read(query, name)) for name in names}

    def seconds(self) -> dict[int, float]:
        """Wall-clock seconds of each attack."""
        return dict(self._read("SELECT attack, seconds FROM seconds ORDER BY attack"))

    def digest(self) -> str:
        """Hash every row that must not depend on when or in how many sittings the run was made."""
        sha = hashlib.sha256()
        for table, order in _DIGESTED:
            sha.update(f"\x00{table}\x00".encode())
            with _files.guard(self.path, "read the ledger"):
                for row in self._db.execute(f"SELECT * FROM {table} ORDER BY {order}"):
                    for cell in row:
                        hash_cell(sha, cell)
        return sha.hexdigest()

    # ---- helpers -------------------------------------------------------------------------------------

    @contextmanager
    def _write(self) -> Iterator[None]:
        with _files.guard(self.path, "write to the ledger"), _transaction(self._db):
            yield

    def _read(self, query: str, *args: object) -> list[Any]:
        with _files.guard(self.path, "read the ledger"):
            return self._db.execute(query, args).fetchall()

    def _ids(self, query: str, *args: object) -> list[int]:
        return [row[0] for row in self._read(query, *args)]

    def _blobs(
        self, query: str, key: tuple[int, ...], ids: list[int], wanted: Iterable[int] | None
    ) -> tuple[NDArray[np.int64], NDArray[Any]]:
        chosen = ids if wanted is None else [int(i) for i in wanted]
        if missing := sorted(set(chosen) - set(ids)):
            raise RecordError(
                f"{self.path} holds no point or input for {rows_text(missing)}; "
                f"it holds {len(ids)}. Ask for broken examples only."
            )
        arrays = [unpack(*self._read(query, *key, i)[0]) for i in chosen]
        return np.asarray(chosen, dtype=np.int64), np.stack(arrays) if arrays else np.zeros((0,), np.float32)


_DIGESTED = [
    ("examples", "id"),
    ("results", "attack, example"),
    ("draws", "attack, example"),
    ("points", "attack, example"),
    ("inputs", "example"),
    ("traces", "attack, example, restart"),
    ("certificates", "name, example"),
]


def _connect(path: Path, write: bool) -> sqlite3.Connection:
    # isolation_level=None: transactions are ours, never opened behind our back.
    if write:
        db = sqlite3.connect(path, isolation_level=None, timeout=10)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        return db
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10)
    db.execute("PRAGMA query_only=ON")
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _check_ours(db: sqlite3.Connection, path: Path, pages: bool) -> None:
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise RecordError(f"{path} is not a ledger of Mohs. Choose another directory.")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != LEDGER_VERSION:
        raise RecordError(
            f"{path} has ledger version {version}; this Mohs reads version {LEDGER_VERSION}. "
            "Use the Mohs that wrote it, or run the evaluation again."
        )
    if pages and (said := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise sqlite3.DatabaseError(said)
