"""A run directory while it is being written: created or resumed, locked, never half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mohs.errors import RecordError
from mohs.records import _files
from mohs.records.header import first_error, header_differences, header_text, load_header
from mohs.records.ledger import Ledger
from mohs.records.record import Record
from mohs.records.schema import Environment, Header, Totals, utc_now


class Run:
    """An open run directory. Use it as a context manager: leaving it early marks the run interrupted.

    Attributes:
        dir: the directory.
        header: the present content of ``record.json``.
        ledger: the rows.
        resumed: whether the directory held an earlier part of this run.
    """

    def __init__(self, directory: Path, header: Header, ledger: Ledger, lock: _files.Lock, resumed: bool) -> None:
        self.dir = directory
        self.header = header
        self.ledger = ledger
        self.resumed = resumed
        self._lock = lock
        self._closed = False

    def update(self, **fields: Any) -> Header:
        """Change fields of the header and write ``record.json``.

        Args:
            fields: any fields of `Header`; they are checked before anything is written.
        """
        content = {name: getattr(self.header, name) for name in Header.model_fields} | fields
        try:
            header = Header.model_validate(content)
        except ValidationError as error:
            raise RecordError(f"the header cannot take {sorted(fields)}: {first_error(error)}.") from error
        _files.write_atomically(self.dir / _files.RECORD, header_text(header))
        self.header = header
        return header

    def adopt(self, header: Header) -> Header:
        """Go on with what a new sitting says of itself; where it stands on another machine, the limits say so.

        Args:
            header: of the new sitting, with the identity of this run.
        """
        limits = [*self.header.limits, *_moved(self.header.environment, header.environment)]
        return self.update(
            status="running", command=header.command, environment=header.environment,
            stated_accuracy=header.stated_accuracy, limits=list(dict.fromkeys(limits)),
            sealed=header.sealed or self.header.sealed,  # who goes on without the seal has looked all the same
        )  # fmt: skip

    def finish(self, status: str = "complete", **fields: Any) -> Header:
        """End the run: totals and digest are taken from the ledger, the header is written.

        Args:
            status: complete or interrupted.
            fields: further fields of `Header`, such as verdict and attacks.
        """
        self.put_bookmark(None)
        totals = totals_of(Record(self.dir, self.header, self.ledger))
        return self.update(
            **{
                "status": status,
                "finished": utc_now(),
                "totals": totals,
                "ledger_digest": self.ledger.digest(),
            }
            | fields
        )

    def record(self) -> Record:
        """Read what is recorded so far."""
        return Record(self.dir, self.header, self.ledger)

    @property
    def bookmark(self) -> Path:
        """The file that says where an unfinished job stands; absent where none is under way."""
        return self.dir / _files.BOOKMARK

    def put_bookmark(self, content: bytes | None) -> None:
        """Replace the bookmark in one step, or remove it."""
        if content is not None:
            _files.write_atomically(self.bookmark, content)
            return
        with _files.guard(self.bookmark, "remove the bookmark"):
            self.bookmark.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the ledger and free the directory; an unfinished run is marked interrupted."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.header.status == "running":
                self.update(status="interrupted")
        finally:
            try:
                self.ledger.close()
            finally:
                self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(directory: str | Path, header: Header) -> Run:
    """Create a run directory, or resume the same run in it.

    A run is the same when its identity is. The lock comes first, the ledger second and ``record.json`` last,
    so that a process killed anywhere in between leaves a directory that can be opened again.

    Args:
        directory: where the run lies; absent or empty, or an earlier part of this very run.
        header: what is about to run. On resumption the stored header is kept, except for what ``Run.adopt`` takes
            over if the run is not complete. A complete one is not written to.

    Returns:
        The open run.

    Raises:
        RecordError: the directory belongs to something else or to another run, is being written by another
            process, cannot be written, or is damaged. Nothing in it is changed then.
    """
    directory = Path(directory)
    _refuse_foreign(directory)
    with _files.guard(directory, "create the run directory"):
        directory.mkdir(parents=True, exist_ok=True)
    lock = _files.Lock(directory)
    try:
        return _open_locked(directory, header, lock)
    except BaseException:
        lock.release()
        raise


def totals_of(record: Record) -> Totals:
    """Count what the ledger holds."""
    certified = record.certified
    return Totals(
        n=record.n,
        clean_correct=int(record.correct.sum()),
        survived=int(record.survived.sum()),
        certified=None if certified is None else int(certified.sum()),
        expected_accuracy=record.expected_accuracy,
    )


def _open_locked(directory: Path, header: Header, lock: _files.Lock) -> Run:
    record_path, ledger_path = directory / _files.RECORD, directory / _files.LEDGER
    for name in (_files.RECORD, _files.BOOKMARK):
        for leftover in directory.glob(f".{name}.*.tmp"):  # of a writer that was killed: the lock is ours
            with _files.guard(leftover, "clear what an interrupted write left"):
                leftover.unlink(missing_ok=True)
    if record_path.exists():
        stored = load_header(directory)
        _refuse_other(directory, stored, header)
        ledger = Ledger.open(ledger_path, write=True)
        if ledger.identity != stored.identity:
            ledger.close()
            raise RecordError(
                f"{ledger_path} belongs to another run than {record_path}. "
                "Restore the directory from a copy or choose another --out."
            )
        run = Run(directory, stored, ledger, lock, resumed=True)
    else:
        # What an earlier process left here was killed before its record.json: it holds no results.
        for leftover in _files.sqlite_files(ledger_path):
            with _files.guard(leftover, "clear what an interrupted start left"):
                leftover.unlink(missing_ok=True)
        ledger = Ledger.create(ledger_path, header.identity)
        run = Run(directory, header, ledger, lock, resumed=False)
    try:
        if run.header.status != "complete":
            run.adopt(header)
    except BaseException:
        ledger.close()
        raise
    return run


def _moved(before: Environment, now: Environment) -> list[str]:
    """What to say of rows made in two environments; nothing if they agree in what bits depend on."""
    said = [
        f"{name} {old} and {new}"
        for name, old, new in (
            ("torch", before.torch, now.torch),
            ("threads", before.threads, now.threads),
            ("device", before.device, now.device),
            ("platform", before.platform, now.platform),
        )
        if old != new
    ]
    if not said:
        return []
    return [f"The run was resumed under another environment ({'; '.join(said)}): bit-identity is not promised."]


def _refuse_foreign(directory: Path) -> None:
    with _files.guard(directory, "look into the run directory"):
        if not directory.exists():
            return
        if not directory.is_dir():
            raise RecordError(f"--out must be a directory; {directory} is a file. Choose another --out.")
        names = {p.name for p in directory.iterdir()}
    if _files.RECORD in names or not names:
        return
    # a killed process leaves the journals of lock and ledger behind as well
    ours = {p.name for name in (_files.LOCK, _files.LEDGER) for p in _files.sqlite_files(directory / name)}
    foreign = sorted(n for n in names if n not in ours and not n.startswith(f".{_files.RECORD}."))
    if foreign or _files.LOCK not in names:
        shown = ", ".join(foreign[:3] or sorted(names)[:3])
        raise RecordError(
            f"{directory} is not empty and holds no record (found: {shown}). "
            "Nothing was changed. Choose a new directory for --out."
        )


def _refuse_other(directory: Path, stored: Header, header: Header) -> None:
    if stored.identity == header.identity:
        return
    differing = header_differences(stored, header)
    said = "; ".join(f"{name}: {_short(left)} there, {_short(right)} here" for name, left, right in differing)
    raise RecordError(
        f"{directory} holds another run ({said or 'settings of the run differ'}). "
        "Choose another --out, or repeat the settings of that run to resume it."
    )


def _short(text: str, most: int = 60) -> str:
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:12]
    return text if len(text) <= most else text[: most - 1] + "…"
