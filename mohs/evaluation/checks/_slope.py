"""Does the gradient keep what it promises?"""

from __future__ import annotations

import torch

from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.problem import Goal
from mohs.regions import L0, L2, Patch, per_row

AVERAGE = 20
"""Evaluations of a random model whose gradients and gains are averaged: one of them is noise."""
LEAST, MOST = 1 / 3, 2.0
"""What a step of a quarter of the radius gains, over what the gradient promised. Of nets trained naturally or against PGD three
quarters of the rows keep 0.44 or more, and three quarters gain no more than 1.03 times of it."""


def kept_promise(probe: Probe) -> Seen:
    """Does a step along the gradient gain what the gradient promises? 1 pass; of a random model, the mean of 20 each."""
    if probe.graph_error:
        return untested("there is no gradient")
    own = probe.gradients[0]
    able = own.isfinite().all(1) & (own != 0).any(1)
    if not bool(able.any()):
        return untested("every gradient is zero or not finite")
    kept = promise_kept(probe)[able].nan_to_num_(nan=0.0)
    low, middle, high = kept.quantile(kept.new_tensor([0.25, 0.5, 0.75])).tolist()
    saw = (
        f"a step of a quarter of the radius along the gradient gains {middle:.2g} times what the gradient promises "
        f"(quartiles {low:.2g} and {high:.2g}; {int(able.sum())} inputs)"
    )
    if low >= LEAST and high <= MOST:
        return ok(saw)
    if middle < LEAST:
        means = (
            "The gradient is not the slope of the answers: noise, a wrong backward pass, or a slope that ends at once. An attack "
            "that follows it wanders."
        )
    else:
        means = (
            "The gradient is true for a step too small to matter: the landscape changes within a fraction of the radius "
            "(shattered gradients, or a softmax at the end that has saturated). An attack that follows it is misled."
        )
    return Seen(
        "warn", saw, means,
        "Take gradients that look further: mohs.gradients.Smooth or FiniteDifference, or Through the layer that shatters "
        "them. Evaluations try these by themselves.",
    )  # fmt: skip


def promise_kept(probe: Probe) -> torch.Tensor:
    """Gain of the margin over the promised one, for a step of a quarter of the radius, [n]."""
    x, region = probe.x, probe.threat.region
    own, draws = Goal.leave(probe.logits.argmax(1)), AVERAGE if probe.random else 1
    g = probe.gradients[0] if draws == 1 else torch.stack([probe.slopes()[0] for _ in range(draws)]).mean(0)
    g = g.view_as(x)
    size = region.eps / 4
    if isinstance(region, L0):  # L0 has no length: a Euclidean step over a quarter of the positions allowed
        width = probe.threat.box[1] - probe.threat.box[0]
        region, size = L2(1.0), width * max(size, 1.0) ** 0.5
    if size == float("inf"):
        region, size = L2(1.0), 0.01 * float(x.flatten(1).norm(dim=1).median())
    if isinstance(region, Patch):  # nor has a patch: a quarter of the way to the best one by the gradient
        moved = x + (region.extreme(g, x, x.new_full((len(x),), region.eps), probe.threat.box) - x) / 4
    else:
        step = region.steepest(g) * per_row(x.new_full((len(x),), size), x)
        moved = (x + step).clamp_(*probe.threat.box)
    promised = (g * (moved - x)).flatten(1).sum(1)

    def mean_margin(points: torch.Tensor) -> torch.Tensor:
        return torch.stack([own.margin(probe.forward(points)) for _ in range(draws)]).mean(0)

    before = own.margin(probe.logits) if draws == 1 else mean_margin(x)
    return (mean_margin(moved) - before) / promised
