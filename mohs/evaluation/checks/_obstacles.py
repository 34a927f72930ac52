"""Why a check after the plan cannot be made: reasons, each '' where there is none, and the decorator that asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from mohs.evaluation.checks._review import Review
from mohs.evaluation.checks._seen import Seen, untested
from mohs.threat import Access

Obstacle = Callable[[Review], str]


def unless(*obstacles: Obstacle) -> Callable[[Callable[[Review], Seen]], Callable[[Review], Seen]]:
    """A check that answers 'not tested' where an obstacle names a reason, the first one that does."""

    def guard(check: Callable[[Review], Seen]) -> Callable[[Review], Seen]:
        @wraps(check)
        def guarded(review: Review) -> Seen:
            for obstacle in obstacles:
                if reason := obstacle(review):
                    return untested(reason)
            return check(review)

        return guarded

    return guard


def closed(review: Review) -> str:
    """No further look at the model may be had."""
    return review.closed


def gradientless(review: Review) -> str:
    """The threat grants no gradients."""
    return "" if review.threat.access >= Access.GRADIENT else "the threat grants no gradients"


def scoreless(review: Review) -> str:
    """The threat grants no scores."""
    return "" if review.threat.access >= Access.SCORE else "the threat grants no scores"


def unsighted(review: Review) -> str:
    """No attack of the plan iterates along gradients."""
    return "" if review.sighted else "the plan has no iterative attack with gradients"


def stepless(review: Review) -> str:
    """No attack of the plan can be given more steps, or another radius."""
    return "" if review.strongest else "the plan has no attack at a fixed radius whose steps can be set"


def whole(review: Review) -> str:
    """Nothing of the model is a defense that could be left out."""
    return "" if review.inner else "nothing could be left out that leaves a classifier"


def uncertain(review: Review) -> str:
    """A random model."""
    random = review.threat.draws > 0
    return "answers of a random model are too uncertain to tell a small gain from luck" if random else ""


def nobody(review: Review) -> str:
    """All is broken."""
    return "" if review.alive.any() else "there are no survivors"
