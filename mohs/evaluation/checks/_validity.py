"""Checks after the plan: do the rows say what they seem to say?"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch

from mohs.evaluation.checks._obstacles import closed, unless
from mohs.evaluation.checks._review import Review, fools
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.evaluation.confirmation import drawn
from mohs.records.schema import CurvePoint
from mohs.records.stats import clopper_pearson
from mohs.regions import Lp

AGAIN = 64
"""Stored points of each attack that are looked at again."""
BACK = 0.05
"""Share of the examples of the accuracy curve that may be broken at one radius and not at a larger one."""


def feasible(review: Review) -> Seen:
    """Does every stored point lie inside region and box, in float64? No pass; reads at most 64 points of each attack."""
    threat, region = review.threat, review.threat.region
    looked, outside, largest = 0, [], 0.0
    for index in review.attacks:
        ids, points, inputs = _stored(review, index)
        if not len(ids):
            continue
        x, x0 = torch.from_numpy(points).double(), torch.from_numpy(inputs).double()
        size = region.measure(x, x0)
        eps = size.new_full((len(x),), region.eps)
        # what rounding in the inputs' own precision may add to a change
        slack = np.finfo(points.dtype).eps * (abs(x0).flatten(1).amax(1) + region.eps)
        if isinstance(region, Lp) and not math.isinf(region.p):
            slack = slack * x0[0].numel() ** (1 / region.p)
        flat = x.flatten(1)
        fine = (size <= eps * (1 + 1e-5) + slack) & flat.isfinite().all(1)
        low, high = (float(np.asarray(bound, points.dtype)) for bound in threat.box)  # as its points can hold them
        fine &= (flat.amin(1) >= low) & (flat.amax(1) <= high)
        looked, largest = looked + len(ids), max(largest, float(size.max()))
        outside += ids[~fine.numpy()].tolist()
    if not looked:
        return Seen("info", "no adversarial point is stored")
    saw = f"{looked} stored adversarial inputs read again in double precision; the largest change is {largest:.6g} of {region.eps:.6g}"
    if not outside:
        return ok(saw)
    return Seen(
        "block", f"{saw}; {len(outside)} lie outside region or box (examples {', '.join(map(str, outside[:5]))})",
        "What was counted as broken was broken by more than the threat allows.",
        "Please report this: no attack of Mohs should be able to do it. An attack of your own cannot pass the target.",
    )  # fmt: skip


@unless(closed)
def rescored(review: Review) -> Seen:
    """Does the model still answer stored points wrongly, in other company? One forward for at most 64 points of each attack."""
    run, looked, right = review.run, 0, []
    for index in review.attacks:
        ids, points, _ = _stored(review, index)
        if not len(ids):
            continue
        order = np.argsort(-ids)  # other company in the batch than before
        x = torch.from_numpy(points[order]).to(run.x)
        y = run.y[torch.from_numpy(ids[order]).to(run.y)]
        missed = ~fools(
            run.model, x, y, drawn(review.threat) if review.threat.draws else 0, run.seed + 1, run.settings.reject
        )
        right += ids[order][missed.cpu().numpy()].tolist()
        looked += len(ids)
    if not looked:
        return Seen("info", "no adversarial point is stored")
    saw = f"of {looked} stored adversarial inputs, asked again in another order, {looked - len(right)} are answered wrongly again"
    random = review.threat.draws > 0
    if len(right) <= (0.1 * looked if random else 0):
        return ok(saw)
    return Seen(
        "warn" if random or len(right) <= max(0.01 * looked, 2) else "block", saw,
        "The answer to a point depends on more than the point: on chance, on the batch, or on what the model was asked before.",
        "Look for randomness that the checks before the run did not see, and for buffers that change in forward(); for a random "
        "model raise Threat(draws=...).",
    )  # fmt: skip


def eight_bit(review: Review) -> Seen:
    """Do the points survive being stored as images of 8 bits? One forward for at most 64 points of each attack."""
    run, box = review.run, review.threat.box
    sample = run.x[: min(len(run.x), 64)]
    grid = sample * 255
    if review.closed or review.threat.draws or box != (0.0, 1.0) or bool((grid - grid.round()).abs().max() > 1e-3):
        return untested("the inputs are no images of 8 bits in [0, 1], or the model is random or closed")
    kept = looked = 0
    for index in review.attacks:
        ids, points, inputs = _stored(review, index)
        if not len(ids):
            continue
        x0 = torch.from_numpy(inputs).to(run.x)
        # towards the clean input, so that no change grows
        change = (torch.from_numpy(points).to(run.x) - x0) * 255
        x = ((x0 * 255).round() + change.sign() * (change.abs() + 1e-3).floor()) / 255
        y = run.y[torch.from_numpy(ids).to(run.y)]
        kept += int(fools(run.model, x, y, 0, run.seed, run.settings.reject).sum())
        looked += len(ids)
    if not looked:
        return Seen("info", "no adversarial point is stored")
    saw = f"{kept} of {looked} adversarial inputs ({kept / looked:.0%}) still fool the model as images of 8 bits within the radius"
    if kept >= 0.5 * looked:
        return ok(saw)
    return Seen(
        "info", saw, "Most changes are finer than a grey level, so they do not pass a file of 8 bits as they are.",
        "If the threat is about image files, attack on that grid.",
    )  # fmt: skip


def labels_agree(review: Review) -> Seen:
    """Have equal inputs equal labels, and were the labels made by the model? No pass."""
    seen: dict[str, set[int]] = defaultdict(set)
    for content, label in zip(review.record.examples.hash, review.record.examples.label, strict=True):
        seen[str(content)].add(int(label))
    torn, n = sum(len(labels) > 1 for labels in seen.values()), review.record.n
    if torn:
        return Seen(
            "warn", f"{torn} inputs occur with more than one label",
            "Whatever the model answers there is counted as an error once, attack or none.", "Repair the labels.",
        )  # fmt: skip
    if n >= 200 and bool(review.record.correct.all()):
        return Seen(
            "info", f"the model answers all {n} examples as labelled",
            "Few models do. If the labels are the model's own answers, robust accuracy is not accuracy but stability.",
            "Take the labels from the data.",
        )  # fmt: skip
    return ok(f"no input of {n} has two labels")


def whole_accuracy(review: Review) -> Seen:
    """Is the model as good on all examples as stated? No pass; of a random model one forward each, as the statement may speak of
    single draws, where the rows hold the majority's answers."""
    stated, n, right = review.run.run.header.stated_accuracy, review.record.n, int(review.record.correct.sum())
    if stated is None or not n:
        return ok(f"{right} of {n} examples are answered rightly; no other number was stated")
    low, high = clopper_pearson(right, n, 0.001)
    saw = f"{right} of all {n} examples right ({right / n:.1%}); stated {stated:.1%}, 99.9% interval {low:.1%} to {high:.1%}"
    if low <= stated <= high:
        return ok(saw)
    if review.threat.draws and not review.closed:
        run = review.run
        once = n - int(fools(run.model, run.x[:n], run.y[:n], 1, run.seed, run.settings.reject, run.batch).sum())
        low, high = clopper_pearson(once, n, 0.001)
        saw += f"; by single draws {once} right ({once / n:.1%}), interval {low:.1%} to {high:.1%}"
        if low <= stated <= high:
            return ok(saw)
    return Seen(
        "block", saw, "This is not the model, the data or the preprocessing that the statement is about.",
        "Check weights, normalisation, channel order, value range and the order of the classes.",
    )  # fmt: skip


def radii(curve: list[CurvePoint]) -> Seen:
    """Is what breaks at one radius broken at each larger one, by the same attack? No pass: of the accuracy curve."""
    points = [p for p in curve if p.eps > 0]
    n = max((p.n for p in points), default=0)
    lost, counted = max((p.lost for p in points), default=0), len(points)
    if counted < 2:
        return untested("there is no curve of accuracy against radius")
    ladder = f"{counted} radii, {points[0].eps:.4g} to {points[-1].eps:.4g}"
    saw = f"at most {lost} of {n} examples were broken at one of {ladder}, and not at a larger one"
    flat = points[0].survived == points[-1].survived and points[0].survived > 0.1 * n
    if lost > max(BACK * n, 1):
        return Seen(
            "warn", saw,
            "A larger radius allows all that a smaller one does. An attack that finds less there is badly set, or is led astray.",
            "Give it more steps, begin at the points of the smaller radius (start=), or look at the gradients.",
        )  # fmt: skip
    if flat and points[-1].eps >= 4 * points[0].eps:
        return Seen(
            "info", f"{saw}; accuracy is the same at all of them ({points[0].survived} of {n})",
            "A radius several times as large breaks no more: the model is robust there, or the attack does not use what it may.",
            "Evaluate at a larger radius too.",
        )  # fmt: skip
    return ok(saw)


def _stored(review: Review, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(examples, adversarial inputs, clean inputs) of an attack, at most ``AGAIN``."""
    rows = review.record.results(index)
    chosen = rows.example[rows.success][:AGAIN].tolist()
    ledger = review.run.run.ledger
    ids, points = ledger.points(index, chosen)
    known, inputs = ledger.inputs(ids.tolist())
    at = np.searchsorted(known, ids)
    return ids, points, inputs[at] if len(ids) else inputs
