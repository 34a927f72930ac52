"""Seals bind and hide; every look is listed, and a list that was changed is refused."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_builder import build

from mohs.errors import DataError, RecordError
from mohs.evaluation.seal import Seal, new_salt, seal, unseal
from mohs.records import Look, Record, Sealed, look, looks, looks_beside, read_looks
from mohs.reports import words

SALT = "0123456789abcdef"


class TestSeal:
    def test_is_the_stated_hash(self) -> None:
        expected = hashlib.sha256(b'{"indices":[5,2,9],"salt":"0123456789abcdef"}').hexdigest()
        assert seal([5, 2, 9], SALT) == expected
        assert seal(np.array([5, 2, 9]), SALT) == expected

    def test_opens_with_exactly_what_was_sealed(self) -> None:
        commitment = seal(range(5), SALT)
        assert unseal(commitment, range(5), SALT) == [0, 1, 2, 3, 4]
        for indices, salt in ((range(6), SALT), ([1, 0, 2, 3, 4], SALT), (range(5), SALT + "x")):
            with pytest.raises(DataError, match="do not fit the commitment"):
                unseal(commitment, indices, salt)

    def test_no_two_lists_are_written_alike(self) -> None:
        assert len({seal(i, SALT) for i in ([1, 2], [12], [2, 1], [1, 2, 0])}) == 4
        assert len({seal([1], new_salt()) for _ in range(20)}) == 20

    @pytest.mark.parametrize("indices", [[], [1, 1], [-1], [0.5], ["a"], [None]])
    def test_what_cannot_be_positions_is_refused(self, indices: list[int]) -> None:
        with pytest.raises(DataError, match="distinct positions"):
            seal(indices, SALT)

    def test_short_salts_are_refused(self) -> None:
        with pytest.raises(DataError, match="salt"):
            seal([1], "short")


class TestLooks:
    def test_first_second_and_the_same_again(self, tmp_path: Path) -> None:
        path = looks_beside(tmp_path / "runs" / "one")
        assert path == tmp_path / "runs" / "looks.jsonl"
        assert read_looks(path) == []
        first = look(path, "c", who="mohs run", run="r1")
        other = look(path, "other", who="mohs run", run="r1")
        again = look(path, "c", who="mohs run, resumed", run="r1")
        second = look(path, "c", who="mohs run --seed 1", run="r2")
        assert [x.look for x in (first, other, again, second)] == [1, 1, 1, 2]
        assert [(x.commitment, x.run) for x in read_looks(path)] == [("c", "r1"), ("other", "r1"), ("c", "r2")]
        assert second.head == hashlib.sha256(path.read_bytes()).hexdigest()

    @pytest.mark.parametrize("damage", ["edit", "drop", "swap"])
    def test_a_changed_list_is_refused(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "looks.jsonl"
        for run in ("r1", "r2", "r3"):
            look(path, "c", who="x", run=run)
        lines = path.read_bytes().splitlines(keepends=True)
        changed = {
            "edit": [lines[0].replace(b"r1", b"r9"), *lines[1:]],
            "drop": lines[1:],
            "swap": [lines[1], lines[0], lines[2]],
        }[damage]
        path.write_bytes(b"".join(changed))
        with pytest.raises(RecordError, match="list of looks was changed"):
            look(path, "c", who="x", run="r4")
        assert path.read_bytes() == b"".join(changed)

    def test_a_line_cut_short_counts_as_a_look_at_anything(self, tmp_path: Path) -> None:
        path = tmp_path / "looks.jsonl"
        look(path, "c", who="x", run="r1")
        with open(path, "ab") as file:
            file.write(b'{"previous": "ab')
        assert look(path, "d", who="x", run="r1").look == 2
        assert look(path, "c", who="x", run="r2").look == 3
        assert [x.commitment for x in read_looks(path)] == ["c", "", "d", "c"]

    def test_writers_at_once_do_not_lose_each_others_looks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, parsed = tmp_path / "looks.jsonl", looks._parsed

        def slowly(*arguments: Any) -> list[Look]:
            time.sleep(0.02)  # between reading the list and adding to it
            return parsed(*arguments)

        monkeypatch.setattr(looks, "_parsed", slowly)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda run: look(path, "c", who="x", run=run).look, "abcdefgh"))
        assert sorted(found) == list(range(1, 9))
        assert sorted(x.run for x in read_looks(path)) == list("abcdefgh")

    def test_opening_writes_the_look_down_and_failing_to_does_not(self, tmp_path: Path) -> None:
        path, commitment = tmp_path / "looks.jsonl", seal([3, 1], SALT)
        with pytest.raises(DataError):
            Seal(commitment, (1, 3), SALT).look(tmp_path / "run", "r", "x")
        assert not path.exists()
        opened = Seal(commitment, (3, 1), SALT)
        indices, sealed = opened.opened(), opened.look(tmp_path / "run", "r", "x")
        assert (indices, sealed.look, sealed.commitment) == ([3, 1], 1, commitment)
        assert read_looks(path) == [Look(commitment, "x", "r")]
        assert json.loads(path.read_text())["previous"] == hashlib.sha256(b"").hexdigest()

    def test_an_unwritable_place_opens_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RecordError):
            Seal(seal([1], SALT), (1,), SALT).look(tmp_path / "file" / "run", "r", "x")


@pytest.mark.parametrize("number", [1, 2])
def test_a_second_look_is_among_the_limits_of_the_record(tmp_path: Path, number: int) -> None:
    sealed = Sealed(commitment="ab" * 32, look=number, head="cd" * 32)
    said = words.limits(Record.load(build(tmp_path / "run", sealed=sealed)))
    assert any(f"look {number} at them" in line and "ab" * 6 in line for line in said) == (number > 1)
