"""Seals bind and hide; every look is listed, and a list that was changed is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_builder import build

from mohs.data import Dataset
from mohs.errors import DataError, RecordError
from mohs.evaluation.seal import Seal, new_salt, seal
from mohs.records import Look, Record, Sealed, look, looks, looks_of, read_looks
from mohs.reports import words

SALT = "0123456789abcdef"
DATA = Dataset(torch.arange(24.0).view(12, 2), torch.arange(12) % 3, name="numbers")


def other(**changed: Any) -> Dataset:
    return Dataset(**{"x": DATA.x, "y": DATA.y, "name": "others"} | changed)


class TestSeal:
    def test_is_the_stated_hash(self) -> None:
        head = b"torch.float32 [2] "
        rows = [hashlib.sha256(head + np.array([2 * i, 2 * i + 1], "<f4").tobytes()).hexdigest() for i in (5, 2, 9)]
        content = hashlib.sha256("".join(f"{id_} {i % 3}\n" for id_, i in zip(rows, (5, 2, 9))).encode()).hexdigest()
        written = f'{{"content":"{content}","indices":[5,2,9],"salt":"0123456789abcdef"}}'
        expected = hashlib.sha256(written.encode()).hexdigest()
        assert seal(DATA, [5, 2, 9], SALT) == expected
        assert seal(DATA, np.array([5, 2, 9]), SALT) == expected

    def test_opens_with_exactly_what_was_sealed(self) -> None:
        closed = Seal.closed(DATA, range(5), SALT)
        assert closed.opened(DATA).ids == DATA.ids[:5]
        for changed in (
            {"indices": (0, 1, 2, 3, 4, 5)}, {"indices": (1, 0, 2, 3, 4)}, {"salt": SALT + "x"}, {"content": DATA.hash}
        ):  # fmt: skip
            with pytest.raises(DataError, match="do not fit the commitment"):
                replace(closed, **changed).opened(DATA)

    @pytest.mark.parametrize(
        "data",
        [
            other(x=DATA.x + 1), other(x=DATA.x.double()), other(y=(DATA.y + 1) % 3), other(x=DATA.x.flip(0)),
            other(x=DATA.x[:4], y=DATA.y[:4]),
        ],
        ids=["inputs", "precision", "labels", "order", "fewer"],
    )  # fmt: skip
    def test_the_same_positions_of_other_data_are_refused(self, data: Dataset) -> None:
        with pytest.raises(DataError, match="seals 5 examples of numbers, and others has other inputs or labels"):
            Seal.closed(DATA, range(5), SALT).opened(data)

    def test_what_was_not_sealed_may_differ(self) -> None:
        more = other(x=torch.cat([DATA.x[:5], -DATA.x]), y=torch.cat([DATA.y[:5], DATA.y]))
        assert Seal.closed(DATA, range(5), SALT).opened(more).ids == DATA.ids[:5]

    def test_no_two_lists_are_written_alike(self) -> None:
        assert len({seal(DATA, i, SALT) for i in ([1, 2], [11], [2, 1], [1, 2, 0])}) == 4
        assert len({seal(DATA, [1], new_salt()) for _ in range(20)}) == 20

    @pytest.mark.parametrize("indices", [[], [1, 1], [-1], [0.5], ["a"], [None]])
    def test_what_cannot_be_positions_is_refused(self, indices: list[int]) -> None:
        with pytest.raises(DataError, match="distinct positions"):
            seal(DATA, indices, SALT)

    def test_short_salts_are_refused(self) -> None:
        with pytest.raises(DataError, match="salt"):
            seal(DATA, [1], "short")


class TestLooks:
    def test_first_second_and_the_same_again(self, tmp_path: Path) -> None:
        path = looks_of(tmp_path / "seal.json")
        assert path == tmp_path.resolve() / "seal.json.looks.jsonl"
        assert read_looks(path) == []
        first = look(path, "c", who="mohs run", run="r1")
        other = look(path, "other", who="mohs run", run="r1")
        again = look(path, "c", who="mohs run, resumed", run="r1")
        second = look(path, "c", who="mohs run --seed 1", run="r2")
        assert [x.look for x in (first, other, again, second)] == [1, 1, 1, 2]
        assert [(x.commitment, x.run) for x in read_looks(path)] == [("c", "r1"), ("other", "r1"), ("c", "r2")]
        assert second.head == hashlib.sha256(path.read_bytes()).hexdigest()
        assert look(path, "c", who="mohs run, resumed", run="r1") == first, "whoever has looked since"

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

        def slowly(*arguments: Any) -> list[tuple[Look, int]]:
            time.sleep(0.02)  # between reading the list and adding to it
            return parsed(*arguments)

        monkeypatch.setattr(looks, "_parsed", slowly)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda run: look(path, "c", who="x", run=run).look, "abcdefgh"))
        assert sorted(found) == list(range(1, 9))
        assert sorted(x.run for x in read_looks(path)) == list("abcdefgh")

    def test_opening_writes_the_look_down_and_failing_to_does_not(self, tmp_path: Path) -> None:
        closed = Seal.closed(DATA, [3, 1], SALT)
        with pytest.raises(DataError, match="has none"):
            closed.look("r", "x")
        kept = closed.write(tmp_path / "seal.json")
        path = tmp_path / "seal.json.looks.jsonl"
        assert not path.exists()
        sealed = kept.look("r", "x")
        assert (sealed.look, sealed.commitment) == (1, closed.commitment)
        assert read_looks(path) == [Look(closed.commitment, "x", "r")]
        assert json.loads(path.read_text())["previous"] == hashlib.sha256(b"").hexdigest()

    def test_an_unwritable_place_opens_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RecordError):
            replace(Seal.closed(DATA, [1], SALT), path=tmp_path / "file" / "seal.json").look("r", "x")

    def test_a_link_and_another_working_directory_lead_to_the_same_list(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for folder in ("here", "there"):
            (tmp_path / folder).mkdir()
        Seal.closed(DATA, [1], SALT).write(tmp_path / "here" / "seal.json")
        (tmp_path / "there" / "link.json").symlink_to(tmp_path / "here" / "seal.json")
        monkeypatch.chdir(tmp_path / "here")
        assert Seal.read("seal.json").look("r1", "x").look == 1
        monkeypatch.chdir(tmp_path / "there")
        assert Seal.read("link.json").look("r2", "x").look == 2
        assert [p.name for p in (tmp_path / "there").iterdir()] == ["link.json"]

    def test_processes_at_once_do_not_lose_each_others_looks(self, tmp_path: Path) -> None:
        Seal.closed(DATA, [1], SALT).write(tmp_path / "seal.json")
        code = (
            "import sys; from mohs.records import look, looks_of; "
            "[look(looks_of('seal.json'), 'c', who='x', run=sys.argv[1] + str(i)) for i in range(8)]"
        )
        running = [subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path) for name in "ab"]
        assert [process.wait() for process in running] == [0, 0]
        listed = read_looks(looks_of(tmp_path / "seal.json"))
        assert sorted(one.run for one in listed) == sorted(f"{name}{i}" for name in "ab" for i in range(8))


@pytest.mark.parametrize("number", [1, 2])
def test_a_second_look_is_among_the_limits_of_the_record(tmp_path: Path, number: int) -> None:
    sealed = Sealed(commitment="ab" * 32, look=number, head="cd" * 32)
    said = words.limits(Record.load(build(tmp_path / "run", sealed=sealed)))
    assert any(f"look {number} at them" in line and "ab" * 6 in line for line in said) == (number > 1)
