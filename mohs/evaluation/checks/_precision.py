"""Check of the numbers: do answers hang on how they are rounded?"""

from __future__ import annotations

import copy

import torch

from mohs.errors import FAILURES
from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.models import BlackBox

MOST = 0.01
"""Share of answers that may differ in float64 without a warning."""


def precision(probe: Probe) -> Seen:
    """Does the model answer the same in float64? 1 pass of a copy in that precision; none where the model is random, a black box,
    or in float64 itself."""
    model, x = probe.model, probe.x
    if probe.random:
        return untested("answers of a random model differ by themselves")
    if any(isinstance(m, BlackBox) for m in model.modules()):
        return untested("a black box has no copy in float64")
    kinds = {t.dtype for t in (*model.parameters(), x)}
    if kinds == {torch.float64}:
        return ok("the model computes in float64")
    try:
        logits = probe.forward(x.double(), copy.deepcopy(model).double())
    except FAILURES:
        return untested("the model has no copy that computes in float64")
    flips = int((logits.argmax(1) != probe.logits.argmax(1)).sum())
    kind = str(probe.logits.dtype).removeprefix("torch.")
    saw = f"{flips} of {len(x)} answers in {kind} are others in float64"
    if not flips:
        return ok(saw)
    return Seen(
        "warn" if flips > max(MOST * len(x), 1) else "info", f"{saw} (threshold {MOST:.0%}, and more than one)",
        "Rounding decides these answers. Changes of an input too small to see do the same, and gradients of such numbers are "
        "mostly rounding error.",
        "Look for differences of large numbers, or half precision, and compute in float32 or float64. Evaluate the model in the "
        "precision in which it is deployed.",
    )  # fmt: skip
