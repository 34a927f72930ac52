"""An interrupted evaluation goes on where it stopped and ends with the very bytes of an uninterrupted one.

As a program, ``python tests/engine/test_resume.py 20`` kills twenty times and prints moments and comparisons.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_problem import THREAT, conv, images, relay_plan
from film import assert_same, evaluate

import mohs
from mohs import records
from mohs.certificates import IBP
from mohs.errors import RecordError
from mohs.evaluation import _bookmark
from mohs.records.ledger import Ledger

ROOT = Path(__file__).parents[2]


# ---- killed from outside ---------------------------------------------------------------------------------


class Server:
    """A process that has loaded everything and forks one child per evaluation, so that a sitting costs no start."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._say() == "ready"

    def _say(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def sitting(self, out: Path, kill_after: float | None, seed: int = 0) -> tuple[float, int]:
        """One try at the evaluation; (seconds it lasted, how it ended: 0 or minus the signal)."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed} {out}\n")
        self.process.stdin.flush()
        pid, began = int(self._say()), time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # if it has ended by now, its number is still its own: nobody has collected it
        self.process.stdin.write("collect\n")
        self.process.stdin.flush()
        ended = int(self._say())
        return time.perf_counter() - began, ended

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def serve() -> None:
    """Fork an evaluation for each line of stdin; say its number, wait for leave to collect it, say how it ended."""
    conv()  # trained before the fork
    _bookmark.EVERY, _bookmark.SHARE = 0.0, 0.5  # half the time goes into bookmarks, so that kills fall on them
    print("ready", flush=True)
    while line := sys.stdin.readline():
        seed, _, out = line.strip().partition(" ")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                evaluate(Path(out), seed=int(seed))
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


def kill_often(server: Server, folder: Path, kills: int, draw: random.Random, tell: Callable[[str], None]) -> None:
    """Kill until that many evaluations have died; each directory is taken to its end and compared."""
    whole, ended = server.sitting(folder / "reference", None)
    assert ended == 0
    tell(f"uninterrupted: {whole:.2f} s")
    died = tries = 0
    while died < kills:
        out = folder / f"killed-{tries}"
        tries += 1
        moments: list[float] = []
        # sittings get longer, so that each directory reaches its end
        while died < kills:
            after = draw.uniform(0, whole * (0.3 + 0.2 * len(moments)))
            lasted, ended = server.sitting(out, after)
            if ended == 0:
                break
            assert ended == -signal.SIGKILL, f"ended with {ended} after {lasted:.2f} s, not by the kill"
            moments.append(after)
            died += 1
        if server.sitting(out, None)[1] != 0:
            raise AssertionError(f"{out} could not be taken to its end after kills at {moments}")
        assert_same(out, folder / "reference")
        told = ", ".join(f"{m:.3f}" for m in moments) or "none"
        tell(f"{out.name}: killed after {told} s; digest, header and rows equal")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    with serving() as server:
        kill_often(server, tmp_path, 4, random.Random(1), lambda text: None)


# ---- every moment, from inside ---------------------------------------------------------------------------


def test_every_kind_of_moment_was_filmed(filmed: tuple[Path, list[Path]]) -> None:
    _, frames = filmed
    states = set()
    for frame in frames:
        if not (frame / "record.json").exists():
            states.add("no header")
        elif list(frame.glob(".record.json.*.tmp")):
            states.add("half a header")
        elif list(frame.glob(".bookmark.safetensors.*.tmp")):
            states.add("half a bookmark")
        elif (frame / "bookmark.safetensors").exists():
            states.add("bookmark")
        elif (frame / "ledger.sqlite-wal").exists():
            states.add("journal")
    assert states == {"no header", "half a header", "journal", "bookmark", "half a bookmark"}


@pytest.mark.parametrize("part", range(4))
def test_resumes_after_any_write(filmed: tuple[Path, list[Path]], part: int, tmp_path: Path) -> None:
    reference, frames = filmed
    # every ninth frame and the first and last few: some in each stage, headers and rows alternating
    chosen = sorted({*range(0, len(frames), 9), 0, 1, 2, 3, len(frames) - 1, len(frames) - 2})
    for index in chosen[part::4]:
        out = tmp_path / f"again-{index}"
        shutil.copytree(frames[index], out)
        for leftover in out.glob(".*.tmp"):
            leftover.rename(out / f"{leftover.name.rsplit('.', 2)[0]}.1.tmp")  # of a process with another number
        evaluate(out, n=24)
        assert_same(out, reference)


def test_journal_torn_by_a_power_cut(filmed: tuple[Path, list[Path]], tmp_path: Path) -> None:
    reference, frames = filmed
    grown = [f for f in frames if (f / "ledger.sqlite-wal").exists() and (f / "record.json").exists()]
    frame = max(grown, key=lambda f: (f / "ledger.sqlite-wal").stat().st_size)
    size = (frame / "ledger.sqlite-wal").stat().st_size
    for kept in (size - 1, size - 5000, size * 2 // 3 + 7, size // 2):
        out = tmp_path / f"torn-{kept}"
        shutil.copytree(frame, out)
        (out / "ledger.sqlite-shm").unlink(missing_ok=True)
        os.truncate(out / "ledger.sqlite-wal", kept)
        with Ledger.open(out / "ledger.sqlite") as torn, Ledger.open(frame / "ledger.sqlite") as whole:
            held = sum(len(torn.answered(a)) for a in torn.attacks()) + len(torn.traces())
            there = sum(len(whole.answered(a)) for a in whole.attacks()) + len(whole.traces())
        # the very last write forgets the points of survivors, and holds no row
        assert held <= there
        assert kept > size - 5000 or held < there
        evaluate(out, n=24)
        assert_same(out, reference)


def test_resumed_run_attacks_only_what_is_missing(filmed: tuple[Path, list[Path]], tmp_path: Path) -> None:
    reference, frames = filmed
    done = records.Record.load(reference)
    frame = next(f for f in frames if (f / "record.json").exists() and _answers(f) == len(done.results(0)))
    out = tmp_path / "run"
    shutil.copytree(frame, out)
    told: list[tuple[str, int]] = []
    mohs.evaluate(
        conv(), images().take(24), THREAT, plan=relay_plan(), claim="accuracy >= 0.5", certificates=[IBP()], out=out,
        batch=16, notify=lambda stage, at, total, broken: told.append((stage, total)),
    )  # fmt: skip
    assert ("1/5 FGSM CE", 0) in told
    assert ("2/5 DeepFool-10", len(done.results(1))) in told


def _answers(directory: Path) -> int:
    with Ledger.open(directory / "ledger.sqlite") as ledger:
        return sum(len(ledger.answered(a)) for a in ledger.attacks())


# ---- interrupted, and two at once ------------------------------------------------------------------------


class Interrupting:
    """Raises KeyboardInterrupt at a stage, as Ctrl-C does."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __call__(self, stage: str, done: int, total: int, broken: int) -> None:
        if self.stage in stage:
            raise KeyboardInterrupt


def test_interrupted_run_says_so_and_can_be_read(tmp_path: Path) -> None:
    data, plan = images().take(24), relay_plan()
    settings = {"plan": plan, "claim": "accuracy >= 0.5", "batch": 16, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        mohs.evaluate(conv(), data, THREAT, notify=Interrupting("PGD"), **settings)
    partial = records.Record.load(tmp_path / "run")
    assert partial.header.status == "interrupted"
    assert partial.verdict is None
    assert "the run is interrupted, not complete" in partial.describe()
    assert partial.attacks == [0, 1]
    whole = mohs.evaluate(conv(), data, THREAT, **settings)
    assert whole.header.status == "complete"
    assert whole.attacks == [0, 1, 2, 3, 4]


def test_another_environment_is_said_in_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = images().take(24), tmp_path / "run"
    settings = {"plan": relay_plan(), "batch": 16, "out": out}
    with pytest.raises(KeyboardInterrupt):
        mohs.evaluate(conv(), data, THREAT, notify=Interrupting("PGD"), **settings)
    before = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.9")
    record = mohs.evaluate(conv(), data, THREAT, **settings)
    said = f"The run was resumed under another environment (torch {before} and 9.9): bit-identity is not promised."
    assert record.header.limits == [said]
    assert record.header.environment.torch == "9.9"
    # a finished one is only read
    monkeypatch.undo()
    assert mohs.evaluate(conv(), data, THREAT, **settings).header == record.header
    whole = tmp_path / "whole"
    assert mohs.evaluate(conv(), data, THREAT, **settings | {"out": whole}).header.limits == []


def test_second_process_on_a_directory_is_refused(tmp_path: Path) -> None:
    data, out = images().take(24), tmp_path / "run"
    refused: list[str] = []

    def second(stage: str, done: int, total: int, broken: int) -> None:
        if "DeepFool" in stage and not refused:
            held = "import sys; from mohs.records._files import Lock; from pathlib import Path\nLock(Path(sys.argv[1]))"
            other = subprocess.run(
                [sys.executable, "-c", held, str(out)], capture_output=True, text=True, timeout=60,
                env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
            )  # fmt: skip
            assert other.returncode == 1
            refused.append(other.stderr)
            with pytest.raises(RecordError, match="being written by another process"):
                mohs.evaluate(conv(), data, THREAT, plan=relay_plan(), batch=16, out=out)

    record = mohs.evaluate(conv(), data, THREAT, plan=relay_plan(), batch=16, out=out, notify=second)
    assert "being written by another process" in refused[0]
    assert record.header.status == "complete"
    record.verify()


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    evaluate(tmp_path / "run", n=16)
    before = (tmp_path / "run" / "record.json").read_bytes()
    with pytest.raises(RecordError, match=r"holds another run .*seed: 0 there, 1 here"):
        evaluate(tmp_path / "run", n=16, seed=1)
    with pytest.raises(RecordError, match=r"holds another run .*data"):
        evaluate(tmp_path / "run", n=17)
    assert (tmp_path / "run" / "record.json").read_bytes() == before


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        with tempfile.TemporaryDirectory() as place, serving() as running:
            kill_often(running, Path(place), int(sys.argv[1]), random.Random(), print)
