"""The nets and images that are attacked, the options of a run, and the set-up as it is printed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mohs
from mohs.data import Dataset, load

from . import peers

BUNDLED_NETS = ("bundled:fashion-natural", "bundled:fashion-pgd")
BUNDLED_DATA = "bundled:fashion-mnist"
SEED = 0


@dataclass(frozen=True)
class Options:
    """What a run was asked for; ``rows`` at most, ``slow_rows`` for what is too slow for all of them,
    ``robust_rows`` of the robust nets."""

    repeats: int = 7
    rows: int = 1000
    slow_rows: int = 64
    wide_rows: int = 256
    robust_rows: int = 256
    libraries: tuple[str, ...] = ("foolbox", "torchattacks", "art", "adv-lib")
    nets: tuple[str, ...] = BUNDLED_NETS
    data: str = BUNDLED_DATA
    subjects: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("linf", "l2", "l1", "l0")
    attacks: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    passes: int = 200
    share: float = 1.0
    patience: int = 60
    aa_cache: Path | None = None
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def keep(self, section: str, rows: list[dict[str, Any]]) -> None:
        """Rows of a table for ``--json``."""
        self.results.setdefault(section, []).extend(rows)

    def peers(self, kind: str) -> dict[str, peers.PeerAttack]:
        """The peers that have this attack, are asked for and can be imported."""
        table = peers.PEERS[kind]
        return {name: table[name] for name in self.libraries if name in table and peers.missing(name) is None}


@dataclass(frozen=True)
class Subject:
    """A net in eval mode and images that it classifies correctly."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor

    def take(self, rows: int) -> Subject:
        return Subject(self.name, self.net, self.x[:rows].clone(), self.y[:rows].clone())

    def clear_gradients(self) -> None:
        """Some peers leave gradients in the parameters; they are nobody else's business."""
        self.net.zero_grad(set_to_none=True)


def images(options: Options) -> Dataset:
    """The first images of the data set: at most ``rows`` of them."""
    data = load(options.data)
    return data.take(min(options.rows, len(data)))


def subjects(options: Options) -> list[Subject]:
    """The nets asked for, each with those of the images that it classifies correctly."""
    data = images(options)
    return [_correct(spec, mohs.models.load(spec), data) for spec in options.nets]


def small_net() -> nn.Module:
    """The architecture of the bundled nets with seeded random weights: for costs, which do not depend on the weights."""
    return _seeded(mohs.models.small_cnn)


def wide_net() -> nn.Module:
    """Three convolutions of 32, 64 and 128 channels and a linear layer, seeded: about 12 times the multiplications of the small net."""
    return _seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * 7 * 7, 10),
        )
    )


def wide_subject(options: Options, epochs: int = 6) -> Subject:
    """The wide net, trained for a few epochs on the very images that are attacked: it needs margins, not a good accuracy."""
    data, net = images(options), wide_net()
    draw = torch.Generator().manual_seed(SEED)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(data), generator=draw).split(50):
            adam.zero_grad()
            nn.functional.cross_entropy(net(data.x[part]), data.y[part]).backward()
            adam.step()
    adam.zero_grad()
    return _correct("wide (briefly trained)", net, data).take(options.wide_rows)


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return build().eval()


def _correct(name: str, net: nn.Module, data: Dataset) -> Subject:
    net = net.eval()
    with torch.no_grad():
        right = torch.cat([net(part).argmax(1) for part in data.x.split(256)]) == data.y
    return Subject(name, net, data.x[right].clone(), data.y[right].clone())


def setup(options: Options, threads: int) -> str:
    """Everything a reader needs to repeat the run, as a Markdown list."""
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, Mohs {mohs.__version__}",
        f"CPU: {_processor()}, {os.cpu_count()} logical cores, {threads} torch threads, float32; load on start: {load_text()}",
        "peers: " + ", ".join(_peer_text(options.libraries)),
        f"data: {options.data}, at most the first {options.rows} images; nets: {', '.join(options.nets)}",
        f"repeats: {options.repeats}, in turn (ours, peer, peer, ..., ours, ...), after one untimed run of each; times are "
        f"seconds, median (minimum to maximum); seed {SEED}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def load_text() -> str:
    """Processes that wanted a core over the last minute: above the number of cores, times mean little."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _peer_text(libraries: Sequence[str]) -> list[str]:
    reasons = {name: peers.missing(name) for name in libraries}
    return [f"{n} {peers.version(n)}" if r is None else f"{n} left out ({r})" for n, r in reasons.items()] or ["none"]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
