"""A disk without room: what was recorded stays, the message says so, and the same command goes on once there is room."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from cli_problem import Shop, in_order, shop

from mohs import records
from mohs.records import _files, ledger

__all__ = ["shop"]


def test_full_disk_in_the_middle_of_a_run(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    put, calls = ledger.Ledger.put_results, []

    def full(self: ledger.Ledger, *args: object) -> None:
        calls.append(args)
        if len(calls) > 1:
            # what SQLite raises then, through the same door
            with _files.guard(self.path, "write to the ledger"):
                raise sqlite3.OperationalError("database or disk is full")
        put(self, *args)

    monkeypatch.setattr(ledger.Ledger, "put_results", full)
    code, _, err = shop.run()
    assert code == 2
    assert in_order(err, "the disk of", "is full", "What was recorded before is intact", "issue the command again")
    assert records.load_header(shop.out).status == "interrupted"
    monkeypatch.undo()
    assert_completes(shop)


def assert_completes(shop: Shop) -> None:
    """The same command, with room, ends with the rows of an undisturbed run."""
    assert shop.run()[0] == 0
    undisturbed = shop.folder / "undisturbed"
    shop.do("run", *shop.model, *shop.how(out=undisturbed))
    assert records.load_header(shop.out).ledger_digest == records.load_header(undisturbed).ledger_digest


LIMIT = """
import resource, torch
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


# too small for the empty ledger, and for its rows
@pytest.mark.parametrize(("room", "doing"), [(4_000, "create"), (90_000, "write")])
def test_file_system_that_refuses_to_write(room: int, doing: str, shop: Shop) -> None:
    pytest.importorskip("resource")
    process = shop.start("run", *shop.model, *shop.how(), code=LIMIT.format(room))
    code, _, err = shop.finish(process)
    assert code == 2, err
    assert in_order(err, f"cannot {doing} ", str(shop.out))
    assert "Traceback" not in err
    assert "damaged" not in err
    assert_completes(shop)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_under_the_output(shop: Shop) -> None:
    with open("/dev/full", "w") as full:
        code, _, err = shop.finish(shop.start("list", "plans", stdout=full))
    assert code == 2
    assert in_order(err, "mohs: the disk is full; free some room", "issue the same command again")
    assert "Traceback" not in err


def test_disk_full_while_the_report_is_written(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.run()
    page = (shop.out / "report.html").read_bytes()
    monkeypatch.setattr(_files.os, "fsync", _no_space)
    code, _, err = shop.do("report", shop.out)
    assert code == 2
    assert in_order(err, "cannot write report.html", "is full")
    monkeypatch.undo()
    assert (shop.out / "report.html").read_bytes() == page
    assert not list(shop.out.glob("*.tmp"))


def _no_space(handle: int) -> None:
    raise OSError(28, "No space left on device")
