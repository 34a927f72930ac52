"""The robust nets of the strength benchmarks, each with its data and the radius it was trained for.

Bundled nets are always there. Two MNIST nets of other people, MNIST itself and the colour images lie outside the project,
in the folder that the environment variable MOHS_SHARED names (default: ``shared`` beside the project), laid out as

    data/mnist/                        the four idx files
    data/models/mnist_fast_pgd.pth     locuslab/fast_adversarial, trained with PGD at Linf 0.3
    data/models/mnist_trades.pth       attackbench/AttackBench, trained with TRADES at Linf 0.3
    data/cifar10_jpeg/cifar10_jpeg75.npz

A subject whose files are not there is left out, and the page says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mohs import models
from mohs.data import load
from mohs.errors import MohsError

from . import nets

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("MOHS_SHARED", ROOT.parent / "shared"))
MNIST = SHARED / "data" / "mnist"


@dataclass(frozen=True)
class RobustSubject:
    """A net in eval mode, the first test images, and the radius for Linf."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    eps: float

    def take(self, rows: int) -> RobustSubject:
        return RobustSubject(self.name, self.net, self.x[:rows].clone(), self.y[:rows].clone(), self.eps)

    def correct(self) -> RobustSubject:
        """Only the images that the net classifies correctly."""
        with torch.no_grad():
            right = torch.cat([self.net(part).argmax(1) for part in self.x.split(256)]) == self.y
        return RobustSubject(self.name, self.net, self.x[right].clone(), self.y[right].clone(), self.eps)


def fast_pgd() -> nn.Module:
    """The MNIST net of locuslab/fast_adversarial."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def trades() -> nn.Module:
    """The MNIST net of TRADES, under the names its weights have."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1024, 200), nn.ReLU(), nn.Dropout(0.5), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10),
    )  # fmt: skip


def _outside(build: Callable[[], nn.Module], file: str) -> nn.Module:
    net = build()
    state = torch.load(SHARED / "data" / "models" / file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    # both files list their layers in order, so the places in the sequence follow from it
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    return net.eval().requires_grad_(True)


def _mnist(build: Callable[[], nn.Module], file: str, rows: int, name: str) -> RobustSubject:
    data = load(f"idx:{MNIST}", n=rows)
    return RobustSubject(name, _outside(build, file), data.x, data.y, 0.3)


def _fashion(name: str, rows: int) -> RobustSubject:
    data = load("bundled:fashion-mnist", n=rows)
    return RobustSubject(name, models.load(f"bundled:{name}"), data.x, data.y, 0.1)


def _cifar(rows: int) -> RobustSubject:
    data = nets.cifar10_images(SHARED / "data" / "cifar10_jpeg" / "cifar10_jpeg75.npz", rows=rows)
    return RobustSubject("cifar10-residual", nets.cifar10_residual(), data.x, data.y, 8 / 255)


SUBJECTS: dict[str, Callable[[int], RobustSubject]] = {
    "mnist-fast-pgd": lambda rows: _mnist(fast_pgd, "mnist_fast_pgd.pth", rows, "mnist-fast-pgd"),
    "fashion-pgd": lambda rows: _fashion("fashion-pgd", rows),
    "fashion-natural": lambda rows: _fashion("fashion-natural", rows),
    "cifar10-residual": _cifar,
    "mnist-trades": lambda rows: _mnist(trades, "mnist_trades.pth", rows, "mnist-trades"),
}


def available(names: Sequence[str], rows: int) -> tuple[list[RobustSubject], list[str]]:
    """The subjects that can be loaded here, and why the others cannot."""
    found, absent = [], []
    for name in names:
        try:
            found.append(SUBJECTS[name](rows))
        except (OSError, MohsError) as error:
            absent.append(f"{name} left out: {error}")
    return found, absent
