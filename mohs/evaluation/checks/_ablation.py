"""Checks after the plan: what is the model without its defense, and does what breaks that break the model?"""

from __future__ import annotations

from mohs.evaluation.checks._obstacles import closed, gradientless, stepless, unless, whole
from mohs.evaluation.checks._review import MOST, Review, excused
from mohs.evaluation.checks._seen import Seen, ok
from mohs.records.stats import clopper_pearson


@unless(closed, gradientless, stepless, whole)
def ablation(review: Review) -> Seen:
    """Does the defense account for the robustness? The strongest attack on the model without it, on at most 32 examples."""
    assert review.strongest is not None
    assert review.inner is not None
    (_, attack), (inner, names) = review.strongest, review.inner
    rows = review.near(MOST, review.record.correct)
    bare = review.tried(attack, rows, guide=inner, model=inner)
    broken, n = int(bare.success.sum()), len(rows)
    kept = int(review.alive[rows.cpu().numpy()].sum())
    saw = f"without {names}, {n - broken} of {n} examples survive {type(attack).__name__}; with it, {kept} survive the plan"
    if kept - (n - broken) > 0.1 * n:
        return Seen(
            "info", saw,
            "What robustness there is comes from the defense, or the defense hides what would break it: the other checks say which.",
            "Compare with an attack that knows the defense, and with the transfer of points from the undefended net.",
        )  # fmt: skip
    if clopper_pearson(broken, n, 0.05)[1] < 0.5:
        return Seen("info", saw, "The net without the defense is about as robust: the defense accounts for none of it.")
    return ok(saw, "The defense makes no difference that could be measured.")


@unless(closed, gradientless, stepless, whole)
def transfer(review: Review) -> Seen:
    """Do points that fool the model without its defense fool the model where its own gradients led nowhere?"""
    assert review.strongest is not None
    assert review.inner is not None
    (_, attack), (inner, names) = review.strongest, review.inner
    rows = review.near(review.afford(3 * attack.steps, most=16))
    if not len(rows):
        return ok("there are no survivors")
    new = int(review.tried(attack, rows, guide=inner).success.sum())
    saw = f"points found on the model without {names} break {new} of the {len(rows)} survivors nearest to breaking"
    if seen := excused(saw, new, len(rows)):
        return seen
    return Seen(
        "warn", saw,
        "The undefended net gives better directions than the defended model itself: the defense hides gradients.",
        "Attack with that net as a guide, mohs.attack(..., guide=inner), or with a stand-in for the defense (mohs.gradients).",
    )  # fmt: skip
