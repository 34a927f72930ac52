"""Checks after the plan: do attacks that know more break what attacks that know less break?"""

from __future__ import annotations

from mohs.attacks.run import refused_norm
from mohs.evaluation._random_points import RandomPoints
from mohs.evaluation.checks._obstacles import closed, scoreless, uncertain, unless, unsighted
from mohs.evaluation.checks._review import FEW, Review, by_scores
from mohs.evaluation.checks._seen import Seen, ok, untested

MASKED = 0.02
"""Share of the control subset that only attacks without gradients may break (two examples at least)."""
FAMILIES = 3
"""Kinds of attacks that a plan should have."""


@unless(unsighted)
def masking(review: Review) -> Seen:
    """Do attacks without gradients break what the others do not? No pass where the plan has both; else a short search by scores."""
    gradients = review.won(review.sighted)
    if review.blind and len(review.control):
        only = review.won(review.blind)[review.control] & ~gradients[review.control]
        new, n = int(only.sum()), len(review.control)
        what = f"of the control subset, attacks without gradients break {new} of {n} examples that those with gradients do not"
    else:
        search = by_scores(review.threat, 200)
        if reason := review.closed or refused_norm(search, review.threat) or scoreless(review):
            return untested(reason)
        rows = review.near(review.afford(search.steps, most=16), review.record.correct & ~gradients)
        if not len(rows):
            return ok("the attacks with gradients broke everything")
        new, n = int(review.tried(search, rows).success.sum()), len(rows)
        what = f"{search.steps} steps of {type(search).__name__} break {new} of {n} examples that attacks with gradients do not"
    saw = f"{what} ({new / n:.1%}, threshold {MASKED:.0%})"
    if not new:
        return ok(saw)
    if new < 2 or new <= MASKED * n:
        return Seen("info", saw, FEW)
    return Seen(
        "warn", saw,
        "Attacks that know less should find less. Where they find more, the gradients hide something (gradient masking), and what "
        "survives attacks with gradients says little.",
        "Use attacks without gradients on all survivors, and look for a guide past what hides the gradient (mohs.gradients).",
    )  # fmt: skip


@unless(closed, uncertain)
def random_points(review: Review) -> Seen:
    """Do random points of the region break what attacks did not? 25 forwards for each of at most 32 survivors."""
    looks = RandomPoints()
    rows = review.near(review.afford(looks.steps))
    if not len(rows):
        return ok("there are no survivors")
    new = int(review.tried(looks, rows, guide=None).success.sum())
    saw = f"{looks.steps} random points of the region each break {new} of the {len(rows)} survivors nearest to breaking"
    if not new:
        return ok(saw)
    return Seen(
        "block" if new >= 2 and new > 0.1 * len(rows) else "warn", saw,
        "No attack should do worse than chance. Where one does, it did not search.",
        "Look at how the attack is set, and for gradients that mislead (mohs.gradients).",
    )  # fmt: skip


def aims(review: Review) -> Seen:
    """Do attacks with and without aims break different examples? No pass."""
    able = [a for a in review.sighted if review.steps[a][1].finite]
    aimed = [a for a in able if review.steps[a][0].aims]
    free = [a for a in able if not review.steps[a][0].aims]
    if not aimed or not free or not len(review.control):
        return untested("it takes a control subset and attacks both with and without aims")
    towards, away = review.won(aimed)[review.control], review.won(free)[review.control]
    only, other, n = int((towards & ~away).sum()), int((away & ~towards).sum()), len(review.control)
    saw = f"of {n} examples of the control subset, {only} were broken only towards single classes and {other} only without an aim"
    if max(only, other) <= MASKED * n:
        return ok(saw)
    return Seen(
        "info",
        saw,
        "Each kind finds what the other misses, so the plan needs both.",
        "Keep both, and try more classes.",
    )


def families(review: Review) -> Seen:
    """How many kinds of attacks are there? No pass."""
    kinds = {
        (type(attack).__name__, repr(getattr(attack, "objective", "")), step.aims > 0)
        for step, attack in (review.steps[index] for index in review.attacks)
    }
    count = len(kinds)
    saw = f"{len(review.attacks)} attacks, of {count} kind{'s' if count != 1 else ''} by method, objective and aim"
    if count >= FAMILIES or not review.alive.any():
        return ok(saw)
    return Seen(
        "info", saw, "Attacks of one kind fail together, so that none of them failing says little more than one failing.",
        "Take a plan with several kinds, one of them without gradients: 'standard' has five.",
    )  # fmt: skip
