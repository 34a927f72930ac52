"""A killed sitting is taken up within its wave, and a bookmark that does not fit costs time only."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from film import assert_same, evaluate
from safetensors import safe_open

from mohs import records
from mohs.errors import RecordError
from mohs.evaluation import _bookmark
from mohs.target import Target


def test_bookmarks_are_taken_up(filmed: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A sitting that begins at a bookmark makes the looks that are left and no others."""
    reference, frames = filmed
    marked = [frame for frame, _, _ in marks(frames)]
    assert len(marked) >= 10
    made, nominate = {}, Target._nominate
    for index in range(0, len(marked), max(1, len(marked) // 6)):
        for kept in (True, False):
            out = tmp_path / f"{index}-{kept}"
            shutil.copytree(marked[index], out)
            if not kept:
                (out / "bookmark.safetensors").unlink()
            passes: list[int] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Target, "_nominate", lambda *a, seen=passes, **k: seen.append(1) or nominate(*a, **k))
                evaluate(out, n=24)
            made[index, kept] = len(passes)
            assert_same(out, reference)
    with_mark = [made[i, True] for i, kept in made if kept]
    without = [made[i, False] for i, kept in made if kept]
    assert sum(with_mark) < 0.95 * sum(without)  # the checks after the plan are made anew in each sitting
    assert with_mark == sorted(with_mark, reverse=True)  # the later the mark, the less is left


CUT = b"cut"


@pytest.mark.parametrize(
    "content", [b"", CUT, b"\x00" * 200, b"{}", b"<html>no</html>"], ids=["empty", "cut", "zeros", "json", "html"]
)
def test_a_spoilt_bookmark_costs_time_only(filmed: tuple[Path, list[Path]], content: bytes, tmp_path: Path) -> None:
    reference, frames = filmed
    out = tmp_path / "run"
    shutil.copytree(marks(frames)[3][0], out)
    whole = (out / "bookmark.safetensors").read_bytes()
    (out / "bookmark.safetensors").write_bytes(whole[: len(whole) // 2] if content == CUT else content)
    evaluate(out, n=24)
    assert_same(out, reference)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_flipped_bits_cost_time_only(filmed: tuple[Path, list[Path]], at: float, tmp_path: Path) -> None:
    reference, frames = filmed
    out = tmp_path / "run"
    shutil.copytree(marks(frames)[3][0], out)
    whole = bytearray((out / "bookmark.safetensors").read_bytes())
    for i in range(int(at * len(whole)), len(whole), 501):
        whole[i] ^= 64
    (out / "bookmark.safetensors").write_bytes(whole)
    evaluate(out, n=24)
    assert_same(out, reference)


def test_a_bookmark_of_another_stage_or_run_is_passed_over(filmed: tuple[Path, list[Path]], tmp_path: Path) -> None:
    reference, frames = filmed
    marked = marks(frames)
    stages = list(dict.fromkeys(stage for _, stage, _ in marked))
    assert len(stages) >= 5
    first, last = (next(frame for frame, stage, _ in marked if stage == wanted) for wanted in (stages[0], stages[-1]))
    identity = records.load_header(reference).identity.encode()
    for name, ledger, mark, old, new in (
        ("later", first, last, b"", b""),
        ("earlier", last, first, b"", b""),
        ("foreign", first, first, identity, b"0" * len(identity)),
    ):
        out = tmp_path / name
        shutil.copytree(ledger, out)
        (out / "bookmark.safetensors").write_bytes((mark / "bookmark.safetensors").read_bytes().replace(old, new))
        evaluate(out, n=24)
        assert_same(out, reference)


def test_a_bookmark_ahead_of_the_ledger_is_passed_over(filmed: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """As when the ledger came back from an older copy: what the bookmark counts as written is not there."""
    reference, frames = filmed
    tried = 0
    for at, (frame, stage, emitted) in enumerate(marks(frames)):
        older = [f for f, other, before in marks(frames)[:at] if other == stage and before < emitted]
        if not older or tried == 3 or "/" not in stage:
            continue
        out = tmp_path / f"run-{at}"
        shutil.copytree(older[0], out)
        shutil.copy(frame / "bookmark.safetensors", out)
        evaluate(out, n=24)
        assert_same(out, reference)
        tried += 1
    assert tried >= 1


def test_a_full_disk_costs_the_bookmark_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(tmp_path / "reference", n=24)
    written: list[int] = []

    def full(self: records.Run, content: bytes | None) -> None:
        if content is not None:
            written.append(len(content))
            raise RecordError("cannot write bookmark.safetensors") from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(records.Run, "put_bookmark", full)
    monkeypatch.setattr(_bookmark, "EVERY", 0.0)
    evaluate(tmp_path / "full", n=24)
    assert_same(tmp_path / "full", tmp_path / "reference")
    assert len(written) >= 5  # once a stage
    monkeypatch.setattr(_bookmark, "LARGEST", 1000)
    before = len(written)
    evaluate(tmp_path / "large", n=24)
    assert len(written) == before


def marks(frames: list[Path]) -> list[tuple[Path, str, int]]:
    """Frames that hold a bookmark, with its stage and the number of answers it counts as written."""
    found = []
    for frame in frames:
        if (frame / "bookmark.safetensors").exists() and not list(frame.glob(".*.tmp")):
            with safe_open(frame / "bookmark.safetensors", framework="pt") as stream:
                stage = json.loads(stream.metadata()["mohs"])["stage"]
                found.append((frame, stage, int(stream.get_tensor("job.emitted").sum())))
    return found
