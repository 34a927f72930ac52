"""AutoAttack by its authors beside `mohs.evaluate`: who is left after each component, at what cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import mohs
from mohs.evaluation.plans import available_plans
from mohs.records import Record

from . import reference
from .measure import Counted, table
from .robust import RobustSubject, available
from .subjects import SEED, Options

HEAD = ["who", "component", "robust after it", "passes so far", "CPU so far, s"]
SUMMARY = [
    "net",
    "plan",
    "robust",
    "robust, AutoAttack",
    "broken by us alone",
    "by AutoAttack alone",
    "needed",
    "passes",
    "CPU",
]
ORDER = ("quick", "standard", "thorough")  # others follow


@dataclass
class Stage:
    """One attack of a plan while it ran: passes and seconds of it alone."""

    name: str
    passes: int
    seconds: float


@dataclass
class Watch:
    """Samples the counter at each word of `mohs.evaluate`, so that checks and curves are told apart from attacks."""

    counted: Counted
    stages: dict[str, Stage] = field(default_factory=dict)
    _began: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __call__(self, stage: str, done: int, total: int, broken: int) -> None:
        now = self.counted.forwards + self.counted.backwards, time.process_time()
        began = self._began.setdefault(stage, now)
        self.stages[stage] = Stage(stage, now[0] - began[0], now[1] - began[1])

    @property
    def attacks(self) -> list[Stage]:
        """The stages that are attacks: they are numbered, such as '2/5 PGD-40 margin'."""
        return [s for s in self.stages.values() if s.name.split(" ")[0].partition("/")[1]]


def run(options: Options) -> Iterator[str]:
    """A table per net, and one over all."""
    rows = options.robust_rows
    yield "## AutoAttack"
    yield (
        f"The first {rows} test images, Linf at the radius each net was trained for. AutoAttack: version 'standard' with its own "
        "settings, seed 0, one batch. Ours: `mohs.evaluate` with built-in plans. A pass is one row forward, or backward to the input, "
        "counted at the model on both sides; ours with padding, and without the control subset that every attack is otherwise run on. "
        "The last line of ours adds the checks. Times are CPU seconds of one run."
    )
    if (reason := reference.missing()) is not None:
        yield f"AutoAttack left out: {reason}."
    chosen, absent = available(options.subjects, rows)
    yield from absent
    cache, summary = reference.Cache(options.aa_cache), []
    for subject in chosen:
        theirs = None if reason else cache.get(subject)
        lines: list[list[object]] = []
        if theirs is not None:
            lines.append([theirs.source, "clean", f"{_share(theirs.clean):.2%}", "", ""])
            for name, left in theirs.survived.items():
                lines.append(
                    ["", name, f"{_share(left):.2%}", f"{theirs.passes[name]:,}", f"{theirs.seconds[name]:.1f}"]
                )
        for plan in options.plans or _plans():
            part, ours = _ours(subject, plan)
            lines += part
            summary.append(_summary(subject, plan, ours, theirs))
        options.keep("autoattack", [{"net": subject.name, **dict(zip(HEAD, line, strict=True))} for line in lines])
        yield f"**{subject.name}**, {len(subject.x)} images, eps {subject.eps:.4f}:\n\n{table(HEAD, lines)}"
    options.keep("autoattack summary", [dict(zip(SUMMARY, line, strict=True)) for line in summary])
    yield (
        "Attacks alone, against all of AutoAttack; the last three columns are ours over AutoAttack's. 'Needed' counts "
        "the rows' own passes for examples that were still standing, as AutoAttack runs; 'passes' what went through the model.\n\n"
        + table(SUMMARY, summary)
    )


def _plans() -> list[str]:
    there = available_plans()
    return [p for p in ORDER if p in there] + [p for p in there if p not in ORDER]


@dataclass(frozen=True)
class Ours:
    """Who survived a plan, [n], and what its attacks took; ``needed``: passes for examples that were still standing."""

    survived: Tensor
    needed: int
    passes: int
    seconds: float


def _ours(subject: RobustSubject, plan: str) -> tuple[list[list[object]], Ours]:
    """Lines of the table, and their sum."""
    counted = Counted(subject.net)
    watch = Watch(counted)
    start = time.process_time()
    record = mohs.evaluate(
        counted,
        (subject.x, subject.y),
        f"linf:{subject.eps}",
        plan=plan,
        seed=SEED,
        notify=watch,
        subject=subject.name,
        control=0,
    )
    seconds = time.process_time() - start
    subject.net.zero_grad(set_to_none=True)
    lines: list[list[object]] = [[f"mohs, {plan}", "clean", f"{record.clean_accuracy:.2%}", "", ""]]
    needed, passes, taken = 0, 0, 0.0
    for index, stage in enumerate(watch.attacks):
        passes, taken = passes + stage.passes, taken + stage.seconds
        broken = (record.breaker >= 0) & (record.breaker <= index)
        left = float((record.correct & ~broken).mean())
        needed += _needed(record, index)
        lines.append(["", stage.name.partition(" ")[2], f"{left:.2%}", f"{passes:,}", f"{taken:.1f}"])
    lines.append(["", "and all else", "", f"{counted.forwards + counted.backwards:,}", f"{seconds:.1f}"])
    return lines, Ours(torch.from_numpy(np.asarray(record.survived)), needed, passes, taken)


def _needed(record: Record, index: int) -> int:
    """Passes that an attack needed for the examples no earlier one had broken, without padding and control subset."""
    if index not in record.attacks:
        return 0
    rows = record.results(index)
    standing = (record.breaker < 0) | (record.breaker >= index)
    mine = standing[np.searchsorted(record.examples.id, rows.example)]
    return int((rows.forwards + rows.backwards)[mine].sum())


def _summary(subject: RobustSubject, plan: str, ours: Ours, theirs: reference.Reference | None) -> list[object]:
    line: list[object] = [subject.name, plan, f"{_share(ours.survived):.2%}"]
    if theirs is None:
        return [*line, "-", "-", "-", f"{ours.needed:,}", f"{ours.passes:,}", f"{ours.seconds:.1f} s"]
    total, took = list(theirs.passes.values())[-1], list(theirs.seconds.values())[-1]
    return [
        *line, f"{_share(theirs.robust):.2%}", int((theirs.robust & ~ours.survived).sum()),
        int((ours.survived & ~theirs.robust).sum()), f"{ours.needed / total:.3f}", f"{ours.passes / total:.3f}",
        f"{ours.seconds / took:.3f}",
    ]  # fmt: skip


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
