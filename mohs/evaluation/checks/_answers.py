"""Check after the plan: do attacks that see nothing but the answer break what gradients and scores did not?"""

from __future__ import annotations

import numpy as np

from mohs.attacks import HopSkipJump
from mohs.attacks.run import refused_norm
from mohs.evaluation._others import nearest_others
from mohs.evaluation.checks._obstacles import closed, uncertain, unless, unsighted
from mohs.evaluation.checks._review import Review, excused
from mohs.evaluation.checks._seen import Seen, ok, untested

SEARCH = HopSkipJump(steps=500, votes=40)
"""What the check runs, and the ladder after it."""
FORWARDS = 20
"""For each example of the evaluation, about so many forwards may go into the check, within ``LEAST`` and ``MOST`` rows."""
LEAST, MOST = 3, 8
"""Rows it runs on."""
BEFORE = ("no-gradient", "zero-gradient", "gradient-promise")
"""Checks before the plan that make gradients suspect."""
AFTER = ("masking", "one-step", "random-points", "unbounded")
"""Checks after the plan that do."""


def unserved(review: Review) -> str:
    """The search does not serve the threat's region."""
    return refused_norm(SEARCH, review.threat) or ""


@unless(closed, unserved, uncertain, unsighted)
def answers_only(review: Review) -> Seen:
    """Do labels alone break what attacks with gradients did not? No pass where nothing else makes the gradients suspect; else at
    most 501 forwards for each of 3 examples (evaluations of fewer than 100) to 8 (of 200 and more)."""
    loud = suspicions(review)
    if not loud:
        return untested("no other check makes the gradients suspect, and labels alone take hundreds of queries")
    count = int(np.clip(FORWARDS * review.record.n // SEARCH.steps, LEAST, MOST))
    rows = review.near(count, review.record.correct & ~review.won(review.attacks))
    if not len(rows):
        return ok("there are no survivors")
    run = review.run
    found = review.tried(SEARCH, rows, guide=None, start=nearest_others(run, rows, review.record))
    new, n = int(found.success.sum()), len(rows)
    saw = (
        f"{SEARCH.steps} queries of HopSkipJump, by the answers alone, break {new} of the {n} survivors nearest to breaking "
        f"(asked because of {', '.join(loud)})"
    )
    return excused(saw, new, n) or Seen(
        "warn", saw,
        "Who sees the answer alone should find far less than who sees gradients. Where that is not so, gradients and scores hide "
        "the way, and what survived them says little.",
        "Run HopSkipJump with thousands of queries on all survivors, and look for a guide past what hides the gradient "
        "(mohs.gradients).",
    )  # fmt: skip


def suspicions(review: Review) -> list[str]:
    """Ids of the checks that make the gradients suspect."""
    loud = ("warn", "block")
    before = [f.id for f in review.run.run.header.checks if f.id in BEFORE and f.severity in loud]
    return before + [id_ for id_ in AFTER if id_ in review.seen and review.seen[id_].severity in loud]
