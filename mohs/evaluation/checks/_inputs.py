"""Checks of the data: do inputs, box, radius and accuracy belong together?"""

from __future__ import annotations

import math

import torch

from mohs import streams
from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, ok
from mohs.records.stats import clopper_pearson
from mohs.regions import Lp

_NORMALISED = (
    "If they are normalised, put the normalisation into the model (mohs.models.normalized) and pass raw inputs, so "
    "that eps is in units of the image."
)


def input_box(probe: Probe) -> Seen:
    """Do the inputs lie in the box of the threat, and fill it? No pass; looks at all inputs."""
    x, (lo, hi) = probe.all_x, probe.threat.box
    low, high = (float(v) for v in torch.aminmax(x))
    mean, std = float(x.mean()), float(x.std(correction=0))
    saw = f"inputs from {low:.4g} to {high:.4g}, mean {mean:.3g}, standard deviation {std:.3g}; box [{lo:g}, {hi:g}]"
    normalised = abs(mean) < 0.5 and 0.5 < std < 2 and low < 0
    flat = x.flatten(1)
    outside = int(((flat.amin(1) < lo) | (flat.amax(1) > hi)).sum())
    if outside:
        grey = (lo, hi) == (0, 1) and low >= 0 and 10 < high <= 255
        if grey:
            remedy = (
                "They look like grey levels 0 to 255: divide by 255, or state the box, such as 'linf:8 in [0, 255]'."
            )
        elif normalised:
            remedy = f"They look normalised. {_NORMALISED}"
        else:
            remedy = f"State the box of valid inputs, such as 'linf:8 in [0, 255]'. {_NORMALISED}"
        return Seen(
            "block", f"{outside} of {len(x)} inputs leave the box: {saw}",
            "Clean inputs count as invalid and eps is in the wrong unit.", remedy,
        )  # fmt: skip
    if math.isinf(lo) or math.isinf(hi):
        if normalised:
            return Seen(
                "info",
                saw,
                "The inputs look normalised, so eps is in units of the normalisation, not of the image.",
                _NORMALISED,
            )
        return ok(saw)
    share = (high - low) / (hi - lo)
    if share < 0.5:
        return Seen(
            "block" if share < 0.02 else "warn", f"the inputs span {share:.2%} of the box: {saw}",
            "Inputs and box seem to have different units, and so would eps.",
            "If the inputs are scaled to [0, 1], state the threat in that scale, such as 'linf:8/255'.",
        )  # fmt: skip
    if lo < 0 and normalised and hi - lo > 2:
        return Seen(
            "warn",
            saw,
            "The inputs look normalised, so eps is in units of the normalisation, not of the image.",
            _NORMALISED,
        )
    return ok(saw)


def distinct(probe: Probe) -> Seen:
    """Is every example another one? No pass; looks at all inputs."""
    n, different = len(probe.all_x), len(streams.content_keys(probe.all_x).unique())
    saw = f"n = {n}, and {different} distinct examples"
    if different == n:
        return ok(saw)
    return Seen(
        "info" if different >= 0.99 * n else "warn", f"n = {n}, but only {different} distinct examples",
        "The bounds assume independent examples; copies make them narrower than they may be.",
        "Give each example once, and draw more of them.",
    )  # fmt: skip


def radius(probe: Probe) -> Seen:
    """Does the region leave anything of the input? No pass; looks at the sample."""
    region, (lo, hi) = probe.threat.region, probe.threat.box
    if probe.threat.minimum or math.isinf(lo) or math.isinf(hi) or not isinstance(region, Lp):
        return ok(f"threat {probe.threat}: not applicable to an infinite radius, an infinite box, l0, patches or words")
    if region.eps == 0:
        return Seen(
            "warn", "eps = 0", "Nothing may change: this measures the clean accuracy.", "Give a radius above 0."
        )
    middle = torch.full_like(probe.x, (lo + hi) / 2)
    erased = float((region.measure(middle, probe.x) <= region.eps).double().mean())
    saw = f"{erased:.0%} of the sample can be turned into one and the same grey image within {probe.threat}"
    if erased < 0.5:
        return ok(saw)
    return Seen(
        "warn", saw,
        "Any content can be erased, so no classifier can do better than guess; the unit of eps is probably wrong.",
        "Check it: for images in [0, 1] an Linf radius of 8 grey levels is 'linf:8/255', not 'linf:8'.",
    )  # fmt: skip


def clean_accuracy(probe: Probe) -> Seen:
    """Is the model as good as stated, and better than guessing? 1 pass of up to 192 more inputs."""
    n, classes = len(probe.many_y), probe.logits.shape[1]
    right = int((probe.many_logits.argmax(1) == probe.many_y).sum())
    low, high = clopper_pearson(right, n, alpha=0.05)
    saw = f"{right} of a random {n} right: {right / n:.1%}, 95% interval {low:.1%} to {high:.1%}"
    if probe.stated_accuracy is not None:
        # blocking a sound model one time in twenty would be a nuisance, hence the wider interval
        least, most = clopper_pearson(right, n, alpha=0.001)
        saw = f"{saw}; stated {probe.stated_accuracy:.1%}"
        if not least <= probe.stated_accuracy <= most:
            return Seen(
                "block", f"{saw}, outside the 99.9% interval {least:.1%} to {most:.1%}",
                "This is not the model, the data or the preprocessing that the statement is about.",
                "Check weights, normalisation, channel order, value range and the order of the classes.",
            )  # fmt: skip
        if not low <= probe.stated_accuracy <= high:
            return Seen(
                "warn", saw, "The statement fits badly; one sound model in twenty looks like this.",
                "Measure the accuracy on more examples.",
            )  # fmt: skip
    if n >= 20 and right <= n / classes:
        return Seen(
            "warn", f"{saw}; guessing gets {1 / classes:.1%}", "The model does not do better than guessing.",
            "Check weights, normalisation and the order of the classes.",
        )  # fmt: skip
    return ok(saw)
