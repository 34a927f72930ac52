"""Checks after the plan: was it the model itself that was attacked, and with other attacks than it was trained against?"""

from __future__ import annotations

import torch
from torch import nn

from mohs.evaluation.checks._obstacles import closed, stepless
from mohs.evaluation.checks._review import MOST, Review, fools
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.guide import answers_for
from mohs.target import classify

MISSED = 0.1
"""Share of the points for the stand-in that may leave the model right."""


def stand_in(review: Review) -> Seen:
    """Do points that fool what gave the gradients fool the model? No pass where that has the model's own answers; else the strongest
    attack on the stand-in alone, on at most 32 examples."""
    run, guide = review.run, review.run.guide
    if guide is None or answers_for(guide, run.model):
        return ok("the gradients are those of something that answers as the model does")
    if reason := closed(review) or stepless(review):
        return untested(reason)
    assert review.strongest is not None
    attack = review.strongest[1]
    rows = review.near(review.afford(3 * attack.steps, most=MOST), review.record.correct)
    if not len(rows):
        return ok("no example is right")
    reject = run.settings.reject
    if reject is not None:
        with torch.no_grad():
            classes = classify(guide, run.x[rows]).shape[1]
        reject = reject if classes > reject else None  # a stand-in that never rejects is fooled without it
    alone = review.tried(attack, rows, guide=None, model=guide, average=1, reject=reject)
    fooled = alone.success.nonzero().squeeze(1)
    if not len(fooled):
        return untested(f"{type(attack).__name__} did not fool the stand-in on {len(rows)} examples")
    points, labels = alone.x[fooled], run.y[rows][fooled]
    hit = int(fools(run.model, points, labels, review.threat.draws, run.seed, run.settings.reject).sum())
    n = len(fooled)
    saw = (
        f"of {n} points that fool {type(guide).__name__}, which gave the gradients, {n - hit} leave the model right "
        f"({1 - hit / n:.0%}, threshold {MISSED:.0%})"
    )
    if n - hit <= max(MISSED * n, 1):
        return ok(saw)
    return Seen(
        "warn", saw,
        "Another model was attacked than the one that is named: what fools the stand-in does not fool the model, so that "
        "the attacks climbed something else than they were judged by.",
        "Attack the model with all of its defense, or with a guide that has its answers (mohs.gradients).",
    )  # fmt: skip


def trained_against(review: Review) -> Seen:
    """Was the model trained against the kind of attack that tests it? No pass."""
    said = stated(review.run.model)
    if not said:
        return untested("nothing says what the model was trained against (attribute trained_against)")
    trained = {text.split("(")[0] for text in said}
    used = {type(review.steps[a][1]).__name__ for a in review.attacks}
    saw = f"trained against {', '.join(said)}; attacked by {', '.join(sorted(used)) or 'nothing'}"
    if not used or used - trained:
        return ok(saw)
    return Seen(
        "warn", saw,
        "The attack of the test is that of the training. A model may have learnt to withstand it alone, by its step size or by the "
        "gradients that it follows, and not others.",
        "Add attacks of another kind: the plan 'standard' has five, one of them without gradients.",
    )  # fmt: skip


def stated(model: nn.Module) -> list[str]:
    """What a model or its parts say that they were trained against: ``trained_against``, the repr of an attack."""
    found = (getattr(m, "trained_against", None) for m in model.modules())
    return list(dict.fromkeys(text for text in found if isinstance(text, str) and text))
