"""AutoAttack by its authors, run component by component, so that what each of them costs and breaks can be told.

It is not part of this project and not on the package index: the environment variable MOHS_AUTOATTACK names a checkout of
https://github.com/fra31/auto-attack. Without it torchattacks' copy is run with the same settings.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import peers
from .measure import Counted
from .robust import RobustSubject

COMPONENTS = ("apgd-ce", "apgd-t", "fab-t", "square")
BATCH = 256  # AutoAttack's own default is 250

Perturb = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Reference:
    """What AutoAttack did: who survived each component, [n], and what it took so far."""

    source: str
    eps: float
    n: int
    clean: Tensor
    survived: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    points: Tensor | None = None

    @property
    def robust(self) -> Tensor:
        """Who survived everything so far."""
        return list(self.survived.values())[-1] if self.survived else self.clean


def missing() -> str | None:
    """Why AutoAttack cannot be run here, or None."""
    if os.environ.get("MOHS_AUTOATTACK") or peers.missing("torchattacks") is None:
        return None
    return "MOHS_AUTOATTACK names no checkout of fra31/auto-attack and torchattacks cannot be imported"


def autoattack(subject: RobustSubject, done: Callable[[Reference], None] = lambda _: None) -> Reference:
    """The standard version for Linf, in its order, each component on whoever is left; ``done`` is told after each."""
    counted = Counted(subject.net)
    source, components = _components(counted, subject.eps)
    x, y = subject.x, subject.y
    clean = torch.cat([_answers(subject.net, part) for part in x.split(BATCH)]) == y
    found = Reference(source, subject.eps, len(x), clean, points=x.clone())
    left, seconds = clean.clone(), 0.0
    for name, perturb in components.items():
        start = time.process_time()
        for rows in left.nonzero().flatten().split(BATCH):
            points = perturb(x[rows].clone(), y[rows].clone()).detach()
            wrong = _answers(counted, points) != y[rows]
            assert found.points is not None
            found.points[rows[wrong]] = points[wrong]
            left[rows[wrong]] = False
        seconds += time.process_time() - start
        found.survived[name], found.seconds[name] = left.clone(), seconds
        found.passes[name] = counted.forwards + counted.backwards
        done(found)
    subject.net.zero_grad(set_to_none=True)
    return found


class Cache:
    """A file of results of AutoAttack, so that ours can be run again alone."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.entries: dict[str, dict[str, Any]] = {}
        if file is not None and file.exists():
            self.entries = torch.load(file, weights_only=True)

    def get(self, subject: RobustSubject) -> Reference:
        """From the file where it was measured on as many rows at this radius, else measured and kept."""
        key = f"{subject.name} {len(subject.x)} {subject.eps:.6g}"
        if key in self.entries:
            return Reference(**self.entries[key])
        found = autoattack(subject)
        self.entries[key] = asdict(found)
        if self.file is not None:
            torch.save(self.entries, self.file)
        return found


def _answers(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


def _components(net: nn.Module, eps: float) -> tuple[str, dict[str, Perturb]]:
    checkout = os.environ.get("MOHS_AUTOATTACK")
    if checkout:
        if checkout not in sys.path:
            sys.path.append(checkout)
        from autoattack import AutoAttack

        its = AutoAttack(net, norm="Linf", eps=eps, seed=0, version="standard", device="cpu", verbose=False)
        its.apgd.loss, its.fab.targeted = "ce", True
        runs = (its.apgd.perturb, its.apgd_targeted.perturb, its.fab.perturb, its.square.perturb)
        return "fra31/auto-attack", dict(zip(COMPONENTS, runs, strict=True))
    ta = peers.load("torchattacks")
    common = {"norm": "Linf", "eps": eps, "seed": 0, "n_restarts": 1}
    runs = (
        ta.APGD(net, steps=100, loss="ce", **common),
        ta.APGDT(net, steps=100, **common),
        ta.FAB(net, steps=100, multi_targeted=True, **common),
        ta.Square(net, n_queries=5000, **common),
    )
    return f"torchattacks {peers.version('torchattacks')}", dict(zip(COMPONENTS, runs, strict=True))
