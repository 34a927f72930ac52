"""Files of a run directory: atomic writes, a lock, and one place that words what the disk says."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mohs.errors import RecordError

RECORD = "record.json"
LEDGER = "ledger.sqlite"
LOCK = ".lock"
BOOKMARK = "bookmark.safetensors"

_NO_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS}


def sqlite_files(path: Path) -> list[Path]:
    """A SQLite file and the journals it may have."""
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))]


@contextmanager
def guard(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system or SQLite raises into a RecordError that says what to do."""
    try:
        yield
    except OSError as error:
        raise RecordError(_os_text(path, doing, error)) from error
    except sqlite3.Error as error:
        raise RecordError(_sqlite_text(path, doing, error)) from error


def write_atomically(path: Path, content: str | bytes, parents: bool = False) -> None:
    """Replace a file by new content in one step: readers see the old file or the new one, never a part.

    Args:
        path: the file.
        content: what it is to hold; a text is written as UTF-8.
        parents: make its directory if absent.
    """
    with guard(path, f"write {path.name}"):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


class Lock:
    """Held by the one process that writes to a run directory; the system frees it when the process dies.

    It is an exclusive transaction on an empty SQLite file: the same on every platform, and never stale.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK
        with guard(path, "lock the run directory"):
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0)
            try:
                self._db.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                self._db.close()
                if "locked" not in str(error):
                    raise
                raise RecordError(
                    f"the run directory {directory} is being written by another process. "
                    "Wait until it ends, end it, or choose another --out."
                ) from error

    def release(self) -> None:
        """Let the next process write."""
        self._db.close()


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _os_text(path: Path, doing: str, error: OSError) -> str:
    said = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        return f"cannot {doing}: {_full(path)}"
    if error.errno in _NO_WRITE:
        return f"cannot {doing}: {_closed(path, said)}"
    return f"cannot {doing}: {path}: {said}. Check the path or choose another --out."


def _sqlite_text(path: Path, doing: str, error: sqlite3.Error) -> str:
    said = str(error)
    if isinstance(error, sqlite3.IntegrityError):
        return (
            f"cannot {doing}: the rows do not fit those in {path} ({said}): an example was answered "
            "twice or is unknown. Ask `answered` first, and record the examples before their results."
        )
    if "full" in said:
        return f"cannot {doing}: {_full(path)}"
    if "disk I/O" in said:
        return (
            f"cannot {doing}: the file system refused to write {path} ({said}): it is full, over a quota, or failing. "
            "What was recorded before is intact. Mend that and issue the command again, or choose another --out."
        )
    if "readonly" in said or "unable to open" in said:
        return f"cannot {doing}: {_closed(path, said)}"
    if "locked" in said or "busy" in said:
        return f"cannot {doing}: {path} is in use by another process. Wait for it or choose another --out."
    return (
        f"cannot {doing}: {path} is damaged or cut short ({said}). "
        "Restore it from a copy, or run the evaluation again into another --out."
    )


def _full(path: Path) -> str:
    return (
        f"the disk of {path} is full. What was recorded before is intact. Free some space and issue the command again."
    )


def _closed(path: Path, said: str) -> str:
    return f"{path} is not accessible ({said}). Change its permissions or choose another --out."
