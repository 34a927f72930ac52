"""Checks after the plan: would its attacks find more with more steps, more restarts, fewer steps, or without a bound?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mohs.attacks import FGSM
from mohs.attacks.run import refused_norm
from mohs.evaluation.checks._obstacles import closed, gradientless, nobody, stepless, uncertain, unless, unsighted
from mohs.evaluation.checks._review import MOST, Review, excused
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.records.stats import clopper_pearson
from mohs.regions import L0

MOVED = 0.05
"""Share of the whole way of the objective, from the clean input to the best point, that twice the steps may still add."""
TRIES = 2
"""Further restarts that are tried."""
PEERS = 0.9
"""Attacks that break so large a share of what the strongest breaks count as tries of one kind."""


@unless(closed, uncertain, stepless, nobody)
def optimisation(review: Review) -> Seen:
    """Do twice the steps change anything for the survivors nearest to breaking? At most a hundredth of the plan's passes, or 6 rows."""
    attack, manner = review.longer(), review.manner
    rows = review.near(review.afford(2 * attack.steps * manner["restarts"] * max(manner["aims"], 1), most=16))
    found = review.tried(attack, rows, start=review.start(rows), **manner)
    new = int(found.success.sum())
    before = torch.from_numpy(review.best[rows.cpu().numpy()])
    start = -torch.from_numpy(review.record.examples.clean_margin[rows.cpu().numpy()])
    gained = (found.margin.double().cpu() - before).clamp_min(0)
    moved = gained / (torch.maximum(found.margin.double().cpu(), before) - start).clamp_min(1e-12)
    middle = float(moved.median())
    saw = (
        f"{attack.steps} steps of {type(attack).__name__}, twice as many as in the plan, break {new} of the {len(rows)} survivors "
        f"nearest to breaking; they add {middle:.1%} (median) to the way that the margin had come (threshold {MOVED:.0%})"
    )
    if not new and middle <= MOVED:
        return ok(saw)
    return Seen(
        "warn", saw,
        "The attacks had not come to their end: with more steps they find more, so the survivors say less than they seem to.",
        "Give the attack more steps, or take a larger plan.",
    )  # fmt: skip


@unless(closed, uncertain, stepless, nobody)
def restarts(review: Review) -> Seen:
    """Do more restarts change anything for the survivors nearest to breaking? And how many of the control subset did a single
    attack of the plan find (Good and Turing)?"""
    assert review.strongest is not None
    attack = review.strongest[1]
    if not getattr(attack, "random", True):
        return untested(f"{type(attack).__name__} draws nothing, so a restart would repeat it")
    manner = review.manner
    rows = review.near(review.afford(2 * TRIES * attack.steps * max(manner["aims"], 1), most=16))
    again = manner | {"restarts": TRIES, "start": review.start(rows)}
    new = int(review.tried(attack, rows, other=1, **again).success.sum())
    saw = (
        f"{TRIES} more restarts of {type(attack).__name__} break {new} of the {len(rows)} survivors nearest to breaking"
    )
    power = {a: int(review.won([a])[review.control].sum()) for a in review.attacks}
    peers = [a for a in review.attacks if power[a] >= PEERS * max(power.values())]
    n = len(review.control)
    if n and len(peers) > 1:
        times = np.sum([review.won([a])[review.control] for a in peers], axis=0)
        once = int((times == 1).sum())
        saw += (
            f"; {once} of {n} examples of the control subset were broken by just one of {len(peers)} attacks of about equal strength, "
            f"so that another like them may be expected to break {once / len(peers) / n:.2%} more (Good and Turing)"
        )
    if not new:
        return ok(saw)
    return Seen(
        "warn", saw,
        "Luck decides what the attacks find: other random starts break what these did not, and more may follow.",
        "Give more restarts, aims or objectives.",
    )  # fmt: skip


@unless(closed, gradientless, unsighted)
def one_step(review: Review) -> Seen:
    """Does a single step break what iterations did not? 3 passes for each of at most 64 survivors of the iterative attacks."""
    if reason := refused_norm(FGSM(), review.threat):
        return untested(reason)
    rows = review.near(64, review.record.correct & ~review.won(review.sighted))
    if not len(rows):
        return ok("the iterative attacks broke everything")
    found = review.tried(FGSM(), rows)
    new = int(found.success.sum())
    saw = f"a single step along the gradient breaks {new} of {len(rows)} examples that no iterative attack with gradients broke"
    if seen := excused(saw, new, len(rows)):
        return seen
    return Seen(
        "warn", saw,
        "Iterations should do at least as well as one step. Where they do not, gradients further along the path do not point "
        "to larger objectives, or the attack is set badly.",
        "Look at the gradients (other guides are tried by evaluations themselves), then at step sizes and the number of steps.",
    )  # fmt: skip


@unless(closed, stepless)
def unbounded(review: Review) -> Seen:
    """Does the attack succeed where the radius allows to become another image? About 20 passes for each of 32 examples."""
    if review.threat.region.eps == 0:
        return untested("a radius of 0 allows no change")
    assert review.strongest is not None
    attack = review.strongest[1]
    rows = review.near(
        MOST, review.record.correct
    )  # of all that are right: what was broken within the radius says no less
    rows, radii = _far(review, rows)
    if not len(rows):
        return untested("no example of another class within the sample")
    found = review.tried(attack, rows, eps=radii)
    # whoever is broken within the radius is broken within a larger one; a model that rejects what is far from all data leaves
    # gradients no way from there
    before = torch.from_numpy(review.won(review.attacks)[rows.cpu().numpy()]).to(found.success.device)
    left, chance = int((~(found.success | before)).sum()), 1 / max(review.run.classes, 2)
    saw = (
        f"{type(attack).__name__} with a radius within which an example of another class lies (median "
        f"{float(radii.median()):.3g}) and the plan leave {left} of {len(rows)} right; guessing would leave {chance:.0%}"
    )
    least = clopper_pearson(left, len(rows), 0.05)[0]
    if left <= chance * len(rows):
        return ok(saw)
    return Seen(
        "block" if least > chance else "warn", saw,
        "A wrong answer is known to exist that near, and the attack does not find it. An attack that fails without a bound says "
        "nothing where it is bounded.",
        "Look for gradients that are missing, wrong or too small (mohs.gradients), and use attacks without gradients as well.",
    )  # fmt: skip


def _far(review: Review, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows for which the sample holds an example with another answer, right or not, and the distance to the farthest
    such example."""
    run, region = review.run, review.threat.region
    answers = torch.from_numpy(review.record.examples.clean_label).to(run.y)
    others = torch.arange(min(review.record.n, MOST), device=run.x.device)
    kept, radii = [], []
    for row in rows.tolist():
        wrong = others[(answers[others] != run.y[row]) & (answers[others] >= 0)]
        wrong = wrong[answers[wrong] < run.classes]  # to be rejected is no wrong answer
        if len(wrong):
            size = region.measure(run.x[wrong], run.x[row : row + 1].expand_as(run.x[wrong]))
            size = size[size.isfinite()]  # other words, or what lies before a patch, are out of reach at any radius
            if len(size):
                kept.append(row)
                radii.append(float(size.max()))
    radius = torch.tensor(radii, dtype=run.x.dtype, device=run.x.device)
    if isinstance(region, L0):
        radius = radius.round()
    return torch.tensor(kept, dtype=torch.int64, device=run.x.device), radius * (1 + 1e-4)
