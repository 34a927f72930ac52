"""Checks of the ground that a gradient attack walks on: where it is flat, where it jumps, and which logit it is steep in."""

from __future__ import annotations

import torch

from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.problem import Goal
from mohs.regions import Words

SPARSE = 0.9
"""Share of a gradient's coordinates that may be exactly zero."""
UNSTEADY = 0.3
"""Share of its lead that an answer may lose or gain by noise. Of 23 nets trained naturally or against PGD it is 0.08 at most. Pintor
et al. look at the cross-entropy and allow 0.1, which is too little: of a net that is sure of its answers, 0.22 changes none of them."""
FEWEST = 8
"""Answers of which a median says something."""
LOPSIDED = 10.0
"""How many times as steep one of the two highest logits may be as the other; of the same nets nine tenths of the rows stay below 2."""


def sparse_gradient(probe: Probe) -> Seen:
    """Does the gradient reach the input everywhere? No pass of its own."""
    if probe.graph_error:
        return untested("there is no gradient")
    own = probe.gradients[0]
    own = own[own.isfinite().all(1) & (own != 0).any(1)]
    if not len(own):
        return untested("every gradient is zero or not finite")
    share = float((own == 0).double().mean(1).median())
    saw = f"{share:.0%} of the coordinates of the margin's gradient are exactly zero (median of {len(own)} inputs)"
    if share <= SPARSE:
        return ok(saw)
    return Seen(
        "info", saw,
        "Few coordinates are connected with the answer. That may be the model's way (an attention window, a mask), or rounding and "
        "dead units stop the gradient for the rest.",
        "If the rest matters to the answers, average gradients over a ball: mohs.gradients.Smooth.",
    )  # fmt: skip


def steadiness(probe: Probe) -> Seen:
    """Does small noise leave the answers' lead as it is? No pass of its own: noise of 2.5% of the inputs' range."""
    if probe.random:
        return untested("repeated passes already differ")
    if isinstance(probe.threat.region, Words):
        return untested("words are no numbers that noise could be added to")
    answers = probe.logits.argmax(1)
    own = Goal.leave(answers)
    before, after = (-own.margin(logits).double() for logits in (probe.logits, probe.noisy_logits))
    moved = ((after - before).abs() / before.abs().clamp_min(1e-12)).clamp_max(1).nan_to_num(nan=1.0)
    middle, most = float(moved.median()), float(moved.quantile(0.75))
    flips = int((probe.noisy_logits.argmax(1) != answers).sum())
    saw = (
        f"noise of 2.5% of the inputs' range moves the lead of the answer by {middle:.1%} (median; three quarters by no more than "
        f"{most:.1%}), and turns {flips} of {len(answers)} answers"
    )
    if middle <= UNSTEADY or len(answers) < FEWEST:
        return ok(saw)
    return Seen(
        "warn", saw,
        "The answers jump about where the eye sees no change, so that the gradient at a point tells little of its surroundings.",
        "Average gradients over a ball (mohs.gradients.Smooth), or search without them: Square.",
    )  # fmt: skip


def imbalance(probe: Probe) -> Seen:
    """Are both of the logits that decide about as steep? 1 pass with 2 backwards, of 16 rows."""
    if probe.graph_error:
        return untested("there is no gradient")
    if probe.logits.shape[1] == 2 and not bool(probe.logits[:, 0].any()):
        return ok("there is one logit")
    first, second = probe.logit_slopes
    # of two flat ones none is steeper
    able = first.isfinite() & second.isfinite() & ((first > 0) | (second > 0))
    if not bool(able.any()):
        return untested("every gradient is zero or not finite")
    first, second = first[able].double(), second[able].double()
    ratio = torch.maximum(first, second) / torch.minimum(first, second)
    middle = float(ratio.median())
    steeper = "highest" if bool((first > second).double().mean() > 0.5) else "second"
    saw = (
        f"of the two highest logits the {steeper} is {middle:.3g} times as steep as the other (median of {len(ratio)} inputs; "
        f"largest {float(ratio.max()):.3g})"
    )
    if middle <= LOPSIDED:
        return ok(saw)
    return Seen(
        "info", saw,
        "An attack on the difference of both follows the steeper logit alone, and may never come to lower or to raise the other "
        "(imbalanced gradients).",
        "Aim at each class in turn, as the plan 'standard' does, or begin with one logit alone (mohs.attacks.ODI).",
    )  # fmt: skip
