"""Checks of what a gradient attack would climb: does a gradient exist, is it finite, does it vanish?"""

from __future__ import annotations

from mohs.errors import rows_text
from mohs.evaluation.checks import _where
from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, Severity, ok, untested
from mohs.models import BlackBox
from mohs.objectives import plain_cross_entropy
from mohs.problem import Goal
from mohs.threat import Access

_STAND_IN = (
    "Give the attack a differentiable stand-in for the backward pass (mohs.attack(..., guide=...)), or use attacks "
    "that need scores or labels only."
)
_BLIND = (
    "Gradient attacks cannot run on this model. That is no robustness: attacks without gradients, or with an "
    "approximate one, may break it."
)
_BLACK_BOX = (
    "A black box has no gradients to give: say what its answers show the adversary, Threat(..., access=Access.SCORE) or "
    "--access score, for an attack that needs no more."
)

FAINT = 1e-3
"""How long the cross-entropy's gradient is at least, over the margin's."""


def saturated_logits(probe: Probe) -> Seen:
    """Are the logits so far apart that the cross-entropy rounds to zero, or loses its gradient? No pass of its own."""
    value, _ = plain_cross_entropy(probe.logits.float(), Goal.leave(probe.logits.argmax(1)))
    zeros = float((value == 0).double().mean())
    median = float(probe.lead.median())
    saw = (
        f"median lead of the highest logit {median:.3g}; the cross-entropy of the model's own answer is exactly 0 for "
        f"{zeros:.0%}"
    )
    if median <= 50 and zeros < 0.5:
        own, likelihood = probe.gradients if not probe.graph_error else (probe.x.new_zeros(1, 1),) * 2
        length = float(own.norm(dim=1).median())
        share = float(likelihood.norm(dim=1).median()) / length if length > 0 else 1.0
        if not share < FAINT:
            return ok(saw)
        return Seen(
            "info", f"{saw}; its gradient is {share:.1g} times as long as the margin's (median, threshold {FAINT:g})",
            "The cross-entropy is nearly flat where the answer is right, as after distillation or much training: attacks of other "
            "tools that follow it with steps of its own length hardly move.",
            "Use the margin, or steps that do not depend on the gradient's length, as the built-in plans do.",
        )  # fmt: skip
    return Seen(
        "warn", saw,
        "In float32 such cross-entropies have no gradient, so attacks of other tools fail on them for no good reason "
        "(gradient masking). The objectives here are scaled and do not vanish, but confidences and fixed constants "
        "mean little.",
        "Trust the margin objective. If the scale was put on the logits on purpose, divide it out: it changes no "
        "answer.",
    )  # fmt: skip


def no_gradient(probe: Probe) -> Seen:
    """Is there a differentiable path from input to logits? 1 forward, 2 backwards; 1 more pass to name the layer."""
    if not probe.graph_error:
        return ok("the logits can be differentiated by the input")
    where = probe.cut()
    white = probe.threat.access >= Access.GRADIENT
    closed = any(isinstance(m, BlackBox) for m in probe.model.modules())
    mend = _BLACK_BOX if closed else f"Remove detach(), no_grad() or the non-differentiable step. {_STAND_IN}"
    return Seen(
        "block" if white else "info",
        f"no input gradient ({probe.graph_error}){': the path breaks ' + where if where else ''}",
        _BLIND if white else "The threat grants no gradients, so none are missed.",
        mend if white else "",
    )  # fmt: skip


def zero_gradient(probe: Probe) -> Seen:
    """Is the gradient finite, and not zero? Shares the passes of the check before; where it is zero, up to 10 of 4 rows more find
    the layers that lose it."""
    if probe.graph_error:
        return untested("there is no gradient")
    own, likelihood = probe.gradients
    bad = (~own.isfinite().all(1) | ~likelihood.isfinite().all(1)).nonzero().flatten().tolist()
    white = probe.threat.access >= Access.GRADIENT
    if bad:
        return Seen(
            "block" if white else "info",
            f"{len(bad)} of {len(own)} input gradients hold nan or inf ({rows_text(bad)} of the sample)",
            "A gradient attack goes nowhere, or anywhere, from there; its failure means nothing.",
            "Look for a division by zero, the logarithm or root of zero, or an overflow in the model.",
        )  # fmt: skip
    flat = (own == 0).all(1)
    lost = (likelihood == 0).all(1) & ~flat
    zero, under = float(flat.double().mean()), float(lost.double().mean())
    saw = (
        f"the gradient of the margin is exactly zero for {zero:.0%} of {len(own)} inputs; plain cross-entropy "
        f"underflows to a zero gradient for a further {under:.0%}"
    )
    if not flat.any():
        if not lost.any():
            return ok(saw)
        return Seen(
            "info", saw,
            "Cross-entropy as other tools compute it is blind there; the objectives here are scaled and are not.",
            "Distrust results of tools that use the plain cross-entropy.",
        )  # fmt: skip
    severity: Severity = "warn" if zero < 0.95 else "block"
    where = _where.zeroed(probe, flat.nonzero().flatten())
    saw += f"; it is lost {where}" if where else ""
    return Seen(
        severity if white else "info", saw,
        "Where the gradient is truly zero, an attack that follows it stays put. That is masking, no robustness.",
        f"Look for rounding, thresholds, saturated activations or a softmax at the end. {_STAND_IN}",
    )  # fmt: skip
