"""What attacks that see answers alone share: where to begin, how near to come to the boundary, and when they are through."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mohs import streams
from mohs.attacks._smallest import nothing_left
from mohs.errors import UsageError
from mohs.problem import Problem
from mohs.regions import largest, per_row

STRETCHES = 8
"""How often the caller's point is moved to twice its distance, after it was looked at itself, before random ones are tried."""
FINEST, COARSEST = 16.0, 1e-3
"""The boundary is located to at least so many units of rounding, and at most so large a share of the distance."""


def answers_alone(problem: Problem, name: str) -> None:
    """Refuse a confidence, of which answers tell nothing.

    Raises:
        UsageError: one was asked for.
    """
    if problem.goal.confidence:
        raise UsageError(
            f"{name} sees answers alone, which tell nothing of margins; got confidence={problem.goal.confidence:g}. Leave "
            "the confidence out (0), or use an attack that sees scores, such as Square, or gradients."
        )


def tolerance(problem: Problem) -> float:
    """How near the search comes to the boundary, as a share of the distance."""
    share = problem.x0[0].numel() ** -1.5
    return min(max(share, FINEST * torch.finfo(problem.x0.dtype).eps), COARSEST)


def blend(problem: Problem, kept: Tensor, size: Tensor) -> Tensor:
    """The point at ``size`` [B] from the clean input towards ``kept``: on the line (L2), or the nearest one (Linf)."""
    return problem.threat.region.project(kept, problem.x0, size, problem.threat.box)


def start(problem: Problem, tried: Tensor, k: int) -> Tensor:
    """Where a wrong answer may be: beyond the caller's point, else noise of random brightness and contrast."""
    x0, (low, high) = problem.x0, problem.threat.box
    noise = streams.uniform(problem.key, tuple(x0.shape[1:]), draw=2 + 2 * k, dtype=x0.dtype)
    if math.isinf(low) or math.isinf(high):
        reach = largest(x0).clamp_min(1.0) * 2.0 ** (tried % STRETCHES)
        x = (x0 + per_row(reach, x0) * (2 * noise - 1)).clamp(low, high)
    else:
        shape = streams.uniform(streams.derive(problem.key, k), (2,), draw=1, dtype=x0.dtype)
        plain = tried % 2 == 1  # the paper's
        middle, contrast = (
            per_row(torch.where(plain, usual, drawn), x0)
            for usual, drawn in ((0.5, shape[:, 0]), (1.0, shape[:, 1] * 4))
        )
        x = low + (high - low) * (middle + contrast * (noise - 0.5)).clamp_(0.0, 1.0)
    if problem.warm is None:
        return x
    change = problem.warm - x0
    further = (tried <= STRETCHES + 1) & (change != 0).flatten(1).any(1)
    stretched = x0 + per_row((2.0 ** (tried - 1)).to(x0), x0) * change
    stretched = torch.where(per_row(tried <= 1, x0), problem.warm, stretched)  # to the last bit
    return torch.where(per_row(further, x0), stretched, x)


def through(problem: Problem) -> Tensor | None:
    """Rows for which nothing is left to gain: inside a finite radius, or wrong without a change."""
    return nothing_left(problem) if problem.threat.minimum else problem.found.met
