"""The smallest change each attack finds, ours and the peers', at equal numbers of passes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs.attacks import REGISTRY
from mohs.errors import MohsError
from mohs.threat import Access

from . import peers
from .measure import Counted, table
from .minimum_peers import MINIMUM
from .robust import RobustSubject, available
from .subjects import SEED, Options

NORMS = {"linf": math.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}
PEER_BATCH = 256
PROBED = 16  # rows that tell what a step costs
BUNDLED = 1000  # images that come with the project
RELAY = "mohs minimum_norm"
TWICE = f"{RELAY}, twice the passes"
SAME = {
    "DeepFool": "DeepFool", "FAB": "FAB", "DDN": "DDN", "FMN": "FMN", "PDGD": "PDGD", "PDPGD": "PDPGD", "ALMA": "ALMA",
    "SuperDeepFool": "SDF", "TrustRegion": "TR", "CarliniWagner": "CW", "EAD": "EAD", "SigmaZero": "sigma-zero",
    "JSMA": "JSMA", "SparseFool": "SparseFool", "LBFGS": "L-BFGS",
}  # fmt: skip
"""Our attack by the peers' name of the same one."""

HEAD = ["attack", "median size", "mean size, common", "success", "passes per row", "steps", "CPU, s"]

Run = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


class TooSlow(Exception):
    """An attack that takes more CPU seconds than a comparison is worth."""


class TooFar(Exception):
    """A trial of an attack that takes many times the passes it should."""


class Patient(Counted):
    """A counted model that gives up after ``seconds`` of CPU time, or ``most`` rows that went forward."""

    def __init__(self, model: nn.Module, seconds: float, most: float = math.inf) -> None:
        super().__init__(model)
        self.end, self.most, self.rows = time.process_time() + seconds, most, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        if time.process_time() > self.end:
            raise TooSlow
        if self.rows > self.most:
            raise TooFar
        return super().forward(x)


@dataclass(frozen=True)
class Found:
    """What one attack brought: sizes [N] (inf: not found), passes per row, steps, seconds."""

    size: Tensor
    passes: float
    steps: int
    seconds: float

    @property
    def median(self) -> float:
        """Of all rows, those without a success at the far end."""
        return float(self.size.sort().values[(len(self.size) - 1) // 2])


def run(options: Options) -> Iterator[str]:
    """One table per net and norm."""
    yield "## Smallest changes"
    yield (
        f"Each attack with as many steps as about {options.passes} passes per image allow (a forward of a row is one pass, so is a "
        "backward to its input), found on a few rows first; DeepFool and others that end by themselves take fewer. Everything is "
        "scored outside: the answer differs, the point lies in the box. Not found counts as infinitely far, so the median is over "
        "all images. 'Common': over the images that every attack of the table with at least 90% success broke. "
        f"Times are CPU seconds of one run; whoever takes more than {options.patience} is left out. Below each table: the relay beside "
        "the best peer, and each of ours beside the best peer with the same attack."
    )
    # ours pads its last batch, so a multiple of it keeps the comparison equal: 256, 512 ... rows
    chosen, absent = available(options.subjects, min(2 * options.robust_rows, max(BUNDLED, options.robust_rows)))
    yield from absent
    for subject in (s.correct().take(options.robust_rows) for s in chosen):
        for norm in options.norms:
            yield from _compare(subject, norm, options)


def _compare(subject: RobustSubject, norm: str, options: Options) -> Iterator[str]:
    found: dict[str, Found] = {}
    failures = []
    for name, attack in {**ours(norm, options.attacks), **theirs(norm, options)}.items():
        budget = 2 * options.passes if name == TWICE else options.passes
        try:
            relay = name in (RELAY, TWICE)
            steps = budget if relay else fitting(attack, subject, budget, options.patience)
            found[name] = measured(attack, subject, NORMS[norm], steps, options.patience)
        except TooSlow:
            failures.append(f"{name} left out: more than {options.patience} s.")
        except Exception as error:  # a peer may fail in any way, and so may an attack under construction
            failures.append(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        subject.net.zero_grad(set_to_none=True)
    rows, text = page(subject, norm, found, options.passes)
    options.keep("minimum", [{"net": subject.name, "norm": norm, **row} for row in rows])
    yield text
    yield from failures


def page(
    subject: RobustSubject, norm: str, found: dict[str, Found], budget: int
) -> tuple[list[dict[str, object]], str]:
    """The table, best median first, as rows and as text with the ratios below it."""
    strong = [f.size for f in found.values() if float(f.size.isfinite().float().mean()) >= 0.9]
    common = (
        torch.stack([s.isfinite() for s in strong]).all(0) if strong else torch.zeros(len(subject.x), dtype=torch.bool)
    )
    rows = [_row(name, f, common) for name, f in sorted(found.items(), key=lambda item: item[1].median)]
    title = f"**{subject.name}**, {norm}, {len(subject.x)} correctly classified images:"
    lines = "\n".join(f"- {line}" for line in (*beside_the_best(found, budget), *beside_the_same(found)))
    return [dict(zip(HEAD, row, strict=True)) for row in rows], f"{title}\n\n{table(HEAD, rows)}\n\n{lines}"


def beside_the_best(found: dict[str, Found], budget: int) -> Iterator[str]:
    """The relay's median over that of the best peer within the budget, at equal passes and at twice as many."""
    peers_found = {name: f for name, f in found.items() if not name.startswith("mohs ") and f.passes <= 1.1 * budget}
    if not peers_found:
        return
    best = min(peers_found, key=lambda name: peers_found[name].median)
    for name in (RELAY, TWICE):
        if name in found:
            yield f"{name}: median {found[name].median / peers_found[best].median:.4f} of the best peer's ({best})"


def beside_the_same(found: dict[str, Found]) -> Iterator[str]:
    """Median and CPU seconds of each of ours over those of the best peer with the same attack."""
    for mine, theirs in SAME.items():
        rivals = [name for name in found if not name.startswith("mohs ") and name.split(" ", 1)[1] == theirs]
        if f"mohs {mine}" not in found or not rivals:
            continue
        own, best = found[f"mohs {mine}"], min(rivals, key=lambda name: found[name].median)
        ratio, seconds = own.median / found[best].median, own.seconds / found[best].seconds
        yield f"{mine}: median {ratio:.4f}, CPU {seconds:.2f} of {best}'s"


def _row(name: str, f: Found, common: Tensor) -> list[object]:
    mean = f.size[common].mean()
    success = f"{int(f.size.isfinite().sum())}/{len(f.size)}"
    return [
        name, f"{f.median:.4f}", f"{float(mean):.4f}" if f.size[common].isfinite().all() else "-", success,
        f"{f.passes:.0f}", f.steps, f"{f.seconds:.1f}",
    ]  # fmt: skip


def measured(attack: Run, subject: RobustSubject, norm: float, steps: int, patience: float) -> Found:
    """Run an attack with so many steps (a relay takes passes for steps); everything counted, scored and timed."""
    start = time.process_time()
    counted = Patient(subject.net, patience)
    x = attack(counted, subject.x, subject.y, steps)
    seconds = time.process_time() - start
    if seconds > patience:
        raise TooSlow
    passes = (counted.forwards + counted.backwards) / len(subject.x)
    return Found(sizes(subject, x, norm), passes, steps, seconds)


def fitting(attack: Run, subject: RobustSubject, budget: int, patience: float) -> int:
    """How many steps cost about ``budget`` passes a row, found on a few rows."""
    few, steps = subject.take(PROBED), budget // 2
    for _ in range(4):  # an attack may cost anything per step, its start as much as its steps
        counted = Patient(subject.net, patience / 4, 3 * budget * len(few.x))
        try:
            attack(counted, few.x, few.y, steps)
        except TooFar:
            steps = max(1, steps // 8)
            continue
        passes = (counted.forwards + counted.backwards) / len(few.x)
        if 0.9 * budget <= passes <= 1.05 * budget:
            break
        steps = min(max(1, math.floor(steps * budget / passes)), budget)
    return steps


def sizes(subject: RobustSubject, x: Tensor, norm: float) -> Tensor:
    """Sizes of the changes that work, [N], inf for the others; judged outside of whoever made them."""
    with torch.no_grad():
        answers = torch.cat([subject.net(part).argmax(1) for part in x.split(PEER_BATCH)])
    flat = x.flatten(1)
    fine = (answers != subject.y) & (flat >= 0).all(1) & (flat <= 1).all(1)
    change = (x.double() - subject.x.double()).flatten(1)
    size = (change != 0).sum(1).double() if norm == 0 else torch.linalg.vector_norm(change, norm, dim=1)
    return size.masked_fill(~fine, math.inf)


def ours(norm: str, names: tuple[str, ...] = ()) -> dict[str, Run]:
    """The relay, and every attack of the registry that looks for the smallest change in this region, by name."""
    threat = Threat.parse("l0-features:inf" if norm == "l0" else f"{norm}:inf")
    single = {
        f"mohs {name}": partial(_ours, kind, threat)
        for name, kind in REGISTRY.items()
        if (not names or name in names) and serves(kind, threat)
    }
    return {RELAY: partial(_relay, threat), TWICE: partial(_relay, threat), **single}


def serves(kind: Any, threat: Threat) -> bool:
    """Can the attack run under this threat, with gradients?"""
    try:
        attack = kind()
    except (TypeError, MohsError):
        return False
    norms = getattr(attack, "norms", None)
    fits = norms is None or threat.region.name.removesuffix("-features") in norms
    return fits and not (attack.finite and threat.minimum) and attack.needs >= Access.GRADIENT


def with_steps(kind: Any, steps: int) -> Any:
    """The attack with about this many steps in all: its field ``steps`` may count those of one phase of several."""
    if "steps" not in {f.name for f in dataclasses.fields(kind) if f.init}:
        return kind()
    default = kind()
    field = next(f.default for f in dataclasses.fields(kind) if f.name == "steps")
    phases = default.steps / field if isinstance(field, int) else 1.0
    return kind(steps=max(1, round(steps / phases)))


def _ours(kind: Any, threat: Threat, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    return mohs.attack(with_steps(kind, steps), model, x, y, threat, seed=SEED).x


def _relay(threat: Threat, model: nn.Module, x: Tensor, y: Tensor, passes: int) -> Tensor:
    return mohs.minimum_norm(model, x, y, threat, passes=passes, seed=SEED).x


def theirs(norm: str, options: Options) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for library, attacks in MINIMUM[norm].items():
        if library in options.libraries and peers.missing(library) is None:
            for name, attack in attacks.items():
                found[f"{library} {name}"] = partial(_batched, attack)
    return found


def _batched(attack: Any, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    parts = zip(x.split(PEER_BATCH), y.split(PEER_BATCH), strict=True)
    return torch.cat([attack(model, a.clone(), b.clone(), steps, SEED) for a, b in parts])  # some change them in place
