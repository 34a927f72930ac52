"""PGD and DeepFool beside the peers' on the same nets and images: time, success, size and passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD, DeepFool

from .measure import Counted, Score, Times, alternate, ratios, score, table
from .peers import PeerAttack
from .subjects import SEED, Options, Subject, subjects, wide_subject

PEER_BATCH = 256
PGD_EPS, PGD_STEPS, PGD_STEP_SIZE = 0.1, 40, 0.01
DEEPFOOL_STEPS = 50
SLOW_DEEPFOOL = ("torchattacks", "art")  # minutes for a thousand images
SIZES = ["mean size", "median size", "mean size, common"]
HEAD = ["attack", "time, s", "time / mohs", "success", *SIZES, "rows forward", "rows backward"]
COMMON = "'Common' is over the rows that every attack of the table found."

Run = Callable[[nn.Module], Tensor]


def pgd(options: Options) -> Iterator[str]:
    """PGD in Linf at a radius that matters, with the same number and size of steps on both sides."""
    yield "## PGD"
    yield (
        f"Linf, eps {PGD_EPS}, {PGD_STEPS} steps of {PGD_STEP_SIZE}, one random start. Peers in batches of {PEER_BATCH}, Mohs "
        f"with its default batch. 'Rows' counts what went through the model, padding and final tests included. {COMMON}"
    )
    for subject in [*subjects(options), wide_subject(options)]:

        def ours(model: nn.Module, s: Subject = subject) -> Tensor:
            return mohs.attack(PGD(PGD_STEPS, PGD_STEP_SIZE), model, s.x, s.y, f"linf:{PGD_EPS}", seed=SEED).x

        runs: dict[str, Run] = {"mohs": ours}
        for name, attack in options.peers("pgd-linf").items():
            runs[name] = _peer(attack, subject, PGD_EPS, PGD_STEPS, PGD_STEP_SIZE)
        yield _compare(subject, runs, math.inf, PGD_EPS, options.repeats)[0]


def deepfool(options: Options) -> Iterator[str]:
    """DeepFool in L2 and Linf; the slowest peers on fewer rows, where everybody is measured again."""
    for norm, form in ((2.0, "l2"), (math.inf, "linf")):
        peers = options.peers(f"deepfool-{form}")
        yield f"## DeepFool, {form}"
        yield (
            f"At most {DEEPFOOL_STEPS} steps, overshoot 0.02, all classes. 'revisit=10' linearises every class at every step, "
            f"as the paper does; the default only the 4 nearest after the first step. {COMMON}"
        )
        for subject in subjects(options):
            quick = {name: attack for name, attack in peers.items() if name not in SLOW_DEEPFOOL}
            yield _compare(subject, _deepfools(subject, form, quick), norm, math.inf, options.repeats)[0]
            slow = {name: attack for name, attack in peers.items() if name in SLOW_DEEPFOOL}
            if not slow:
                continue
            few = subject.take(options.slow_rows)
            yield f"{' and '.join(slow)}: far slower, so compared on the first {len(few.x)} of these images."
            text, times = _compare(few, _deepfools(few, form, slow), norm, math.inf, min(options.repeats, 3))
            yield text
            for name in [name for name in slow if name in times]:
                taken = times[name].median * len(subject.x) / len(few.x)
                yield f"Extrapolated to all {len(subject.x)} images, not measured: {name} {taken:.1f} s."


def _deepfools(subject: Subject, form: str, peers: dict[str, PeerAttack]) -> dict[str, Run]:
    def ours(attack: DeepFool) -> Run:
        return lambda model: mohs.attack(attack, model, subject.x, subject.y, f"{form}:inf", seed=SEED).x

    runs = {"mohs": ours(DeepFool(DEEPFOOL_STEPS)), "mohs (revisit=10)": ours(DeepFool(DEEPFOOL_STEPS, revisit=10))}
    for name, attack in peers.items():
        runs[name] = _peer(attack, subject, math.inf, DEEPFOOL_STEPS, 0.0)
    return runs


def _peer(attack: PeerAttack, subject: Subject, eps: float, steps: int, step_size: float) -> Run:
    def run(model: nn.Module) -> Tensor:
        parts = zip(subject.x.split(PEER_BATCH), subject.y.split(PEER_BATCH), strict=True)
        return torch.cat([attack(model, x, y, eps, steps, step_size, SEED) for x, y in parts])

    return run


def _compare(
    subject: Subject, runs: dict[str, Run], norm: float, eps: float, repeats: int
) -> tuple[str, dict[str, Times]]:
    """Run everything once, counted and scored, then time what worked in turn."""
    found: dict[str, tuple[Score, Counted]] = {}
    failures = ""
    for name, run in runs.items():
        counted = Counted(subject.net)
        try:
            x = run(counted)
        except Exception as error:  # a peer may fail in any way; the others are still compared
            if name.startswith("mohs"):
                raise
            failures += f"\n\n{name} failed: {type(error).__name__}: {error}"
            continue
        found[name] = score(subject.net, subject.x, x, subject.y, norm, eps), counted
    times = alternate({name: partial(runs[name], subject.net) for name in found}, repeats, subject.clear_gradients)
    subject.clear_gradients()
    common = torch.stack([got.success for got, _ in found.values()]).all(0)
    rows = []
    for name, (got, counted) in found.items():
        ratio = f"{ratios(times[name], times['mohs']).median:.2f}"
        rows.append([name, times[name], ratio, *got.cells(common), f"{counted.forwards:,}", f"{counted.backwards:,}"])
    return f"**{subject.name}**, {len(subject.x)} correctly classified images:\n\n{table(HEAD, rows)}{failures}", times
