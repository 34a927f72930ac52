"""The run that the tests of resumption interrupt, and a film of it: its directory after each write."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_problem import THREAT, conv, header_facts, images, relay_plan, rows_of

import mohs
from mohs import records
from mohs.certificates import IBP
from mohs.evaluation import _bookmark
from mohs.evaluation._bookmark import Bookmark
from mohs.records import _files
from mohs.records.ledger import Ledger


def evaluate(out: Path, n: int = 48, seed: int = 0) -> records.Record:
    """The run that is interrupted: every kind of attack and row, and a certificate."""
    return mohs.evaluate(
        conv(), images().take(n), THREAT, plan=relay_plan(), claim="accuracy >= 0.5", certificates=[IBP()], out=out,
        batch=16, seed=seed,
    )  # fmt: skip


def assert_same(out: Path, reference: Path) -> None:
    """Digest, header and every row equal, bit for bit."""
    found, wanted = records.Record.load(out), records.Record.load(reference)
    found.verify()
    assert header_facts(out) == header_facts(reference)
    assert rows_of(found) == rows_of(wanted)
    assert found.digest() == wanted.digest() == found.header.ledger_digest
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in reference.iterdir())


def film(folder: Path) -> tuple[Path, list[Path]]:
    """A whole run, and a copy of its directory as a kill would have left it after each write, and inside header writes."""
    out, frames = folder / "reference", []

    def shoot() -> None:
        frame = folder / f"frame-{len(frames)}"
        shutil.copytree(out, frame)
        frames.append(frame)

    write, replace, keep = Ledger._write, os.replace, Bookmark._keep
    pauses = itertools.count()

    def sparing_keep(self: Bookmark, *given: Any) -> None:
        if next(pauses) % 5 == 0:
            keep(self, *given)

    @contextlib.contextmanager
    def filmed_write(self: Ledger) -> Iterator[None]:
        with write(self):
            yield
        shoot()

    def filmed_replace(source: str, target: str) -> None:
        shoot()  # the new header lies beside the old one
        replace(source, target)
        shoot()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "_write", filmed_write)
        patch.setattr(_files.os, "replace", filmed_replace)
        patch.setattr(_bookmark, "EVERY", 0.0)
        patch.setattr(_bookmark, "SHARE", math.inf)
        patch.setattr(Bookmark, "_keep", sparing_keep)
        evaluate(out, n=24)
    return out, frames
