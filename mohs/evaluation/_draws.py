"""How many evaluations of a random model have to be averaged for its gradient to say something."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mohs.errors import MohsError
from mohs.evaluation.checks._probe import Probe
from mohs.objectives import margin
from mohs.problem import Goal
from mohs.target import classify

MEASURED = 8
"""Gradients, each of another draw, from which signal and noise are told."""
ALIGNED = 0.8
"""Cosine to the gradient of the expectation that an average ought to have: with it, a step gains four fifths of the best one."""
LEAST, MOST = 2, 40
"""Fewer than two would be no average; beyond forty, twice as many steps gain more than twice as many draws."""
LARGEST = 2_000_000
"""Input values whose gradients are kept at once: fewer examples of large inputs are looked at."""
USUAL = 10
"""Where nothing can be measured."""


def draws_needed(probe: Probe, guide: nn.Module | None = None) -> tuple[int, float]:
    """How many draws to average, and the measured signal-to-noise ratio of one (nan: no gradient to measure).

    With g the gradient of the expectation and v the mean squared deviation of one draw's gradient from it, the average of m
    draws has the cosine 1 / sqrt(1 + v / (m |g|^2)) to g, so

        m = (v / |g|^2) / (1 / c^2 - 1)

    for a cosine c. The gradients are those of ``guide``, where the model has none of its own. Signal and noise are told apart
    as in an analysis of variance; of the examples, the median is taken.

    Cost: 8 forwards and backwards of the sample.
    """
    try:
        slopes = torch.stack([_slopes(probe, guide or probe.model) for _ in range(MEASURED)])
    except (MohsError, RuntimeError):
        return USUAL, math.nan
    ratio = signal_to_noise(slopes)
    if math.isnan(ratio):
        return USUAL, ratio
    if ratio == 0:
        return MOST, ratio
    return min(max(math.ceil(1 / ratio / (1 / ALIGNED**2 - 1)), LEAST), MOST), ratio


def signal_to_noise(slopes: Tensor) -> float:
    """Median over rows of |g|^2 / v, from gradients [draws, rows, D]; inf without noise, nan without gradients.

    >>> quiet = torch.ones(4, 3, 5)
    >>> signal_to_noise(quiet)
    inf
    """
    slopes = slopes.double()
    slopes = slopes / slopes.abs().amax((0, 2), keepdim=True).clamp_min(1e-300)  # squares of 1e-200 would vanish
    m = len(slopes)
    noise = slopes.var(0).sum(1)
    signal = (slopes.mean(0).square().sum(1) - noise / m).clamp_min(0)  # the mean of m draws holds an m-th of the noise
    known = slopes.isfinite().all(2).all(0) & ((noise > 0) | (signal > 0))
    if not bool(known.any()):
        return math.nan
    return float((signal[known] / noise[known]).median())


def _slopes(probe: Probe, model: nn.Module) -> Tensor:
    """Gradients of the margin to the labels, [n, D]: not to the model's own answers, which change from draw to draw."""
    goal = Goal.leave(probe.y, reject=probe.reject)
    found = []
    count = max(4, min(len(probe.x), LARGEST // probe.x[0].numel()))
    for at in range(0, count, probe.batch or len(probe.x)):
        rows = torch.arange(at, at + (probe.batch or len(probe.x)), device=probe.x.device).clamp_max(len(probe.x) - 1)
        x = probe.x[rows].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = classify(model, x)
        _, cotangent = margin(logits.detach(), goal.take(rows))
        (slope,) = torch.autograd.grad(logits, x, cotangent)
        found.append(slope.flatten(1)[: len(probe.x) - at])
    return torch.cat(found)[:count]
