"""Checks after the plan: would the same run say the same again, does chance matter, and how fine is the answer?"""

from __future__ import annotations

import numpy as np
import torch

from mohs.evaluation.checks._obstacles import closed, stepless, uncertain, unless
from mohs.evaluation.checks._review import Review
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.records.rows import SCORE
from mohs.records.stats import clopper_pearson

ROWS = 12
"""Examples that are attacked again, at most."""
COARSE = 0.05
"""Half the width of an interval above which the answer is called coarse: about what 400 examples leave."""
POINTS = 10
"""Points with fresh draws of which something can be said."""


@unless(closed, uncertain, stepless)
def repeatable(review: Review) -> Seen:
    """Does the strongest attack come to the same end in other company? Once more on 4 to 12 examples that it had, with the same seed,
    in another order."""
    assert review.strongest is not None
    (index, attack), manner = review.strongest, review.manner
    rows = review.record.results(index)
    if review.elsewhere:
        return untested(f"of {type(attack).__name__}, {review.elsewhere}")
    passes = 2 * attack.steps * manner["restarts"] * max(manner["aims"], 1)
    count = min(review.afford(passes, least=4, most=ROWS), len(rows.example))
    if not count:
        return untested("the attack had no example")
    # spread over all that it had, the last ones first
    picked = np.unique(np.linspace(0, len(rows.example) - 1, count).astype(np.int64))[::-1].copy()
    again = review.tried(attack, torch.from_numpy(rows.example[picked]).to(review.run.x.device), **manner).success
    n, torn = len(picked), int((again.cpu().numpy() != rows.success[picked]).sum())
    saw = (
        f"{type(attack).__name__} again, with the same seed in other batches: {n - torn} of {n} examples end as before"
    )
    if not torn:
        return ok(saw)
    return Seen(
        "info", saw,
        "Which examples are broken depends on their company, at least by rounding, so two runs differ by a few of them.",
        "Read results with their interval; where answers depend on the batch by more than rounding, say so by 'batch'.",
    )  # fmt: skip


def chance(review: Review) -> Seen:
    """Do the draws of a random model ever disagree? No pass: the draws that confirmed points and scored them."""
    if not review.threat.draws:
        return ok("the threat scores one draw")
    draws = review.record.draws
    mine = (draws.attack < review.upto) & ((draws.attack == SCORE) | np.isin(draws.attack, review.attacks))
    count, wrong = draws.drawn[mine], draws.wrong[mine]
    if len(count) < POINTS:
        return untested(f"fewer than {POINTS} points were asked on fresh draws")
    torn = int(((wrong > 0) & (wrong < count)).sum())
    saw = f"at {torn} of {len(count)} attacked points the fresh draws disagree"
    if torn:
        return ok(saw)
    return Seen(
        "info", saw,
        "The randomness changes logits, but never an answer: the model may as well be called deterministic, and be evaluated at a "
        "fraction of the price.",
        "Leave out 'draws' of the threat.",
    )  # fmt: skip


def resolution(review: Review) -> Seen:
    """Are there examples enough to tell claims apart? No pass."""
    n, alive = review.record.n, int(review.alive.sum())
    low, high = clopper_pearson(alive, n, alpha=0.05)
    saw = f"with {n} examples the 95% interval of the robust accuracy is {low:.1%} to {high:.1%}"
    if high - low <= 2 * COARSE:
        return ok(saw)
    return Seen(
        "info", saw, f"Claims and improvements by less than {(high - low) / 2:.0%} cannot be told from luck.", "Give more examples."
    )  # fmt: skip
