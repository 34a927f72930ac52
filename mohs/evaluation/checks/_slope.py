"""Does the gradient keep what it promises?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohs.evaluation._quiet import untouched
from mohs.evaluation.checks import _where
from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.problem import Goal
from mohs.regions import L0, L2, Patch, Words, per_row

ROWS = 16
"""Rows of the sample that are looked at where the model is random."""
AVERAGE = 20
"""Gradients of a random model that are averaged: one of them is noise."""
PAIRS = 8
"""Gains of a random model that are averaged. Before and after the step it is given the same draws, so that the difference of the
two has little noise, and fewer are enough."""
SEED = 104_729
"""Of those draws; away from the small seeds that people give, as the gradients must be of other draws."""
LEAST, MOST = 1 / 3, 2.0
"""What a step of a quarter of the radius gains, over what the gradient promised. Of nets trained naturally or against PGD three
quarters of the rows keep 0.44 or more, and three quarters gain no more than 1.03 times of it."""


def kept_promise(probe: Probe) -> Seen:
    """Does a step along the gradient gain what the gradient promises? 1 pass; of a random model 19 of 16 rows with gradients, and
    16 of them without. Where it does not, a few passes of 16 rows more look for the layer."""
    if probe.graph_error:
        return untested("there is no gradient")
    own = probe.gradients[0]
    able = own.isfinite().all(1) & (own != 0).any(1)
    if probe.random:
        able = able[:ROWS]
    if not bool(able.any()):
        return untested("every gradient is zero or not finite")
    kept = promise_kept(probe)[able]
    kept = kept[~kept.isnan()]  # 0 of 0: the box leaves no such step
    if not len(kept):
        return untested("no step along the gradient stays in the box")
    low, middle, high = kept.quantile(kept.new_tensor([0.25, 0.5, 0.75])).tolist()
    saw = (
        f"a step of a quarter of the radius along the gradient gains {middle:.2g} times what the gradient promises "
        f"(quartiles {low:.2g} and {high:.2g}; {len(kept)} inputs)"
    )
    if low >= LEAST and high <= MOST:
        return ok(saw)
    # of a random model that would take dozens of passes
    where = "" if probe.random else _where.breaking(probe, min(ROWS, len(own)), lambda *how: _keeps(probe, *how))
    if where:
        saw += f"; it keeps its promise where it is handed on unchanged {where}"
    if middle < LEAST:
        means = (
            "The gradient is not the slope of the answers: noise, a wrong backward pass, or a slope that ends at once. Steps "
            "along it do not add up to progress, so an attack that takes them says little."
        )
    else:
        means = (
            "The gradient is true for a step too small to matter: the landscape changes within a fraction of the radius "
            "(shattered gradients, or a softmax at the end that has saturated). Steps along it do not "
            "lead to the largest change within the radius, so an attack that takes them says little."
        )
    return Seen(
        "warn", saw, means,
        "Take gradients that look further: mohs.gradients.Smooth or FiniteDifference, or Through the layer that shatters "
        "them. Evaluations try these by themselves.",
    )  # fmt: skip


def _keeps(probe: Probe, guide: nn.Module | None, rows: int) -> bool:
    """Do the gradients of a guide keep their promise at most of these rows?"""
    kept = promise_kept(probe, rows, guide)
    low, high = kept.nan_to_num_(nan=0.0).quantile(kept.new_tensor([0.25, 0.75])).tolist()
    return low >= LEAST and high <= MOST


def promise_kept(probe: Probe, rows: int | None = None, guide: nn.Module | None = None) -> Tensor:
    """Gain of the margin over the promised one, for a step of a quarter of the radius, [rows].

    Args:
        probe: model and sample.
        rows: so many of the sample. None: all, of a random model ``ROWS``.
        guide: where the gradients come from. None: the model itself.
    """
    region, draws = probe.threat.region, AVERAGE if probe.random else 1
    x = probe.x[: rows or (ROWS if probe.random else None)]
    own = Goal.leave(probe.logits[: len(x)].argmax(1))
    # the gradients of the other checks are the first draw
    first = probe.gradients[0][: len(x)] if guide is None else probe.slopes(x, guide)[0]
    g = torch.stack([first, *(probe.slopes(x, guide)[0] for _ in range(draws - 1))]).mean(0).view_as(x)
    size = region.eps / 4
    if isinstance(region, L0):  # L0 has no length: a Euclidean step over a quarter of the positions allowed
        width = probe.threat.box[1] - probe.threat.box[0]
        region, size = L2(1.0), width * max(size, 1.0) ** 0.5
    if size == float("inf"):
        region, size = L2(1.0), 0.01 * float(x.flatten(1).norm(dim=1).median())
    if isinstance(
        region, Patch | Words
    ):  # nor has a patch, or a word: a quarter of the way to the best one by the gradient
        moved = x + (region.extreme(g, x, x.new_full((len(x),), region.eps), probe.threat.box) - x) / 4
    else:
        step = region.steepest(g) * per_row(x.new_full((len(x),), size), x)
        moved = (x + step).clamp_(*probe.threat.box)
    promised = (g * (moved - x)).flatten(1).sum(1)
    if not probe.random:
        gain = own.margin(probe.forward(moved)) - own.margin(probe.logits[: len(x)])
    else:
        gain = torch.stack([_gain(probe, own, x, moved, draw) for draw in range(PAIRS)]).mean(0)
    return gain.double() / promised.double()  # quantiles are not known in half precision


def _gain(probe: Probe, own: Goal, x: Tensor, moved: Tensor, draw: int) -> Tensor:
    """Margin after the step minus that before it, under the same draws, [rows]."""
    margins = []
    for points in (x, moved):
        with untouched(probe.model, SEED + draw):
            margins.append(own.margin(probe.forward(points)))
    return margins[1] - margins[0]
