"""Who looked at sealed examples: a list that is only ever added to, each line of which names what came before."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mohs.errors import RecordError
from mohs.records import _files
from mohs.records.schema import Sealed


@dataclass(frozen=True)
class Look:
    """One look at sealed examples.

    Attributes:
        commitment: of what was opened; empty where the line was cut short, so that it may have been anything.
        who: the command.
        run: identity of the run.
    """

    commitment: str
    who: str
    run: str


def looks_of(seal: str | Path) -> Path:
    """Where the looks at what a seal closes are listed: beside its file, by whatever link it was reached."""
    file = Path(seal).resolve()
    return file.with_name(f"{file.name}.looks.jsonl")


def read_looks(path: str | Path) -> list[Look]:
    """All looks, in order; none where there is no list.

    Raises:
        RecordError: a line does not fit those before it, so something was changed or taken out.
    """
    path = Path(path)
    with _files.guard(path, "read the list of looks"):
        content = path.read_bytes() if path.exists() else b""
    return [one for one, _ in _parsed(path, content)]


def look(path: str | Path, commitment: str, *, who: str, run: str) -> Sealed:
    """Write down a look, before anything is seen.

    Args:
        path: the list; it is made if absent.
        commitment: of what is opened.
        who: the command.
        run: identity of the run. One that is listed already is not another look: it sees the same again.

    Returns:
        What a header says of it: which look it is, and the hash of the list up to it. Who keeps the record can tell from
        that hash whether lines before it were changed or dropped later.

    Raises:
        RecordError: the list was changed, or cannot be written.
    """
    path = Path(path)
    with _alone(path), _files.guard(path, "write down the look"):
        content = path.read_bytes() if path.exists() else b""
        seen = [(other, end) for other, end in _parsed(path, content) if other.commitment in (commitment, "")]
        at = next((i for i, (other, _) in enumerate(seen) if other.commitment and other.run == run), None)
        if at is not None:
            content = content[: seen[at][1]]  # as it was when this run looked first, whoever has looked since
        else:
            # what a process that was killed left of a line stays, as it may have looked
            start = b"" if not content or content.endswith(b"\n") else b"\n"
            before = content + start
            entry = {"previous": _hash(before), "seal": commitment, "who": who, "run": run}
            line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
            with open(path, "ab") as file:
                file.write(start + line)
                file.flush()
                os.fsync(file.fileno())
            at, content = len(seen), before + line
    return Sealed(commitment=commitment, look=at + 1, head=_hash(content))


def _parsed(path: Path, content: bytes) -> list[tuple[Look, int]]:
    """Each look, and where its line ends."""
    found, at = [], 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            previous, one = entry["previous"], Look(entry["seal"], entry["who"], entry["run"])
        except (ValueError, KeyError, TypeError):
            one = Look("", "unknown: the line was cut short", "")
        else:
            if previous != _hash(content[:at]):
                raise RecordError(
                    f"{path}: line {number} does not fit what comes before it, so the list of looks was changed. Restore it "
                    "from a copy; without it nobody can tell how often the examples were looked at."
                )
        at += len(line)
        found.append((one, at))
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the list alone; the system frees it when the process dies."""
    lock = path.with_name(f".{path.name}.lock")
    with _files.guard(path, "lock the list of looks"):
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(lock, isolation_level=None, timeout=30)
        try:
            db.execute("BEGIN EXCLUSIVE")
        except BaseException:
            db.close()
            raise
    try:
        yield
    finally:
        db.close()
