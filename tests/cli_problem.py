"""What the tests of the command line share: a small net on disk, a short plan, and ways to start a command."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from mohs import cli, models
from mohs.data import load

ROOT = Path(__file__).parents[1]
DATA = "bundled:fashion-mnist"
PLAN = """
name = "short"
[[attack]]
use = "FGSM"
[[attack]]
use = "PGD"
with = { steps = 5 }
restarts = 2
"""


@cache
def _state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.linear()
        x, y = load(DATA)
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(30):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
    return net.state_dict()


class Shop:
    """A directory with weights and a plan, and commands started in it."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capfd = folder, capfd
        net = models.linear()
        net.load_state_dict(_state())
        self.weights = folder / "linear.safetensors"
        models.save_weights(net, self.weights)
        self.plan = folder / "short.toml"
        self.plan.write_text(PLAN)
        self.out = folder / "run"

    @property
    def model(self) -> list[str]:
        return ["linear", DATA, "--weights", str(self.weights), "--n", "24"]

    def how(self, **changes: object) -> list[str]:
        """The options of ``mohs run``, some of them changed."""
        usual = {"threat": "linf:0.02", "plan": self.plan, "batch": 8, "out": self.out}
        return [str(part) for name, value in (usual | changes).items() for part in (f"--{name}", value)]

    def do(self, *argv: object) -> tuple[int, str, str]:
        """Run a command in this process: exit code, stdout and stderr, with the line breaks of the terminal undone."""
        self._capfd.readouterr()
        code = cli.run([str(a) for a in argv])
        said = self._capfd.readouterr()
        return code, plain(said.out), plain(said.err)

    def run(self, *more: object) -> tuple[int, str, str]:
        """``mohs run`` on the small net, with further arguments."""
        return self.do("run", *self.model, *self.how(), *more)

    def refused(self, *argv: object) -> str:
        """A command that must end with exit code 2, one message, no traceback, and nothing in --out; the message."""
        code, out, err = self.do(*argv)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("mohs: ")
        assert not self.out.exists()
        return err

    def start(self, *argv: object, code: str = "", **settings: object) -> subprocess.Popen[str]:
        """Start ``python -m mohs``, after some lines of Python if asked for."""
        head = ["-c", f"{code}\nfrom mohs.cli import main\nmain()"] if code else ["-m", "mohs"]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": self.folder}
        return subprocess.Popen(
            [sys.executable, *head, *map(str, argv)], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            **usual | settings,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """Wait for a started command: exit code, stdout and stderr."""
        out, err = process.communicate(timeout=120)
        return process.returncode, plain(out), plain(err)


def plain(text: str | None) -> str:
    """Without the frames and line breaks that depend on the terminal."""
    return " ".join((text or "").replace("│", " ").split())


def in_order(text: str, *parts: str) -> bool:
    """Do the parts come in the text, one behind the other?"""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@pytest.fixture
def shop(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.chdir(tmp_path)
    return Shop(tmp_path, capfd)
