"""When a point counts as breaking a model with randomness of its own: an exact test on draws that had no part in its choice."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.errors import UsageError
from mohs.evaluation._quiet import untouched
from mohs.evaluation._rejection import rejection
from mohs.problem import Goal
from mohs.target import classify, rounding
from mohs.threat import Threat

ALPHA = 0.01
"""Probability at which an example is called broken though none of the points that were confirmed at it is wrong in more than half of
the draws: over all looks at the example together, and where each of its points is wrong in exactly one half; else less."""
TIMES, LEAST = 5, 100
"""So many times as many draws as the threat names confirm a point, and at least so many: fewer would miss breaks near one half."""


def level(look: int) -> float:
    """Error rate of the k-th look at an example: ``alpha * 6 / (pi k)^2``, which adds up to ``ALPHA`` over all k.

    >>> round(sum(level(k) for k in range(1, 10_000)), 4)
    0.01
    """
    return ALPHA * 6 / (math.pi * look) ** 2


@cache
def needed(draws: int, look: int = 1) -> int:
    """The fewest wrong answers at which the exact binomial test rejects 'at most half of the draws are wrong'.

    >>> needed(100), needed(100, look=10)
    (63, 70)
    """
    allowed, tail, wrong = level(look), 0, draws + 1
    while wrong > 0 and (tail + math.comb(draws, wrong - 1)) / 2**draws <= allowed:
        wrong -= 1
        tail += math.comb(draws, wrong)
    return wrong


def confirm(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat | str, *, seed: int = 0, look: int = 1, reject: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which points break the model, [N]: wrong in more than half of its draws, beyond reasonable doubt.

    An attack looks at many points and reports one that won, some of them by luck. Here each point is asked again on fresh draws,
    and counts where the exact binomial test rejects 'at most half of the draws are wrong'. Use it on what ``mohs.attack`` found on
    a random model; an evaluation does so by itself. It misses points that are wrong in little more than half of the draws.

        broken  <=>  P(Binomial(m, 1/2) >= wrong) <= alpha * 6 / (pi k)^2,   m = max(5 * draws, 100), alpha = 0.01

    Args:
        model: as it is deployed (in eval mode; the Dropout below is in training mode, as its noise is what is shown); inputs in the
            box to logits.
        x: attacked points [N, ...].
        y: true classes [N]. Only 'answered otherwise' is confirmed; that a targeted attack reached its target is not.
        threat: its ``draws`` say how the model is scored; 0: one answer decides.
        seed: of the fresh draws; another one than that of the attack gives no other answers but by chance.
        look: how many points were confirmed at these examples so far, and this one: each gets draws of its own, and a smaller
            error rate, so that trying again and again does not end in luck.
        reject: index of the logit by which the model rejects an input, its last one (-1 also names it): to be rejected is no success.
            Default: as the model's defenses declare.
        ids: number of each example, int64 [N], none twice; its draws depend on it. Default: 0, 1, ... .

    Raises:
        UsageError: two rows have the same number; ``reject`` names no logit of the model, or not the one that it rejects by.

    Cost: 100 forwards of one row per example, or five times the threat's ``draws``; of a deterministic model one. One row at a
    time, as a model may draw once for a whole batch, and the errors at two examples must not depend on each other. None of these
    rows is part of the passes that an attack reports.

    >>> noisy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.2)).train()  # drops at random
    >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> confirm(noisy, points, torch.tensor([1, 1]), Threat.parse("linf:0.1"), seed=1).tolist()
    [True, False]

    **Differs from the paper**: not of one.

    **Source**: W. Feller, An Introduction to Probability Theory and Its Applications, volume 1 (1968), chapter VI, for the
    binomial tail; the error rates of the looks add up as in Bonferroni's inequality.
    """
    threat = Threat.parse(threat)
    ids = torch.arange(len(x), device=x.device) if ids is None else ids.to(x.device)
    if len(ids.unique()) < len(ids):
        raise UsageError(
            "ids must name each example once, as its draws depend on its number; confirm two points of one in two calls."
        )
    if not threat.draws:
        return fresh(model, x, y, ids, torch.ones_like(ids), 1, seed, reject) > 0
    m = drawn(threat)
    return fresh(model, x, y, ids, torch.full_like(ids, look), m, seed, reject) >= needed(m, look)


def drawn(threat: Threat) -> int:
    """How many fresh draws confirm a point under a threat."""
    return max(TIMES * threat.draws, LEAST)


def fresh(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, looks: Tensor, draws: int, seed: int, reject: int | None = None
) -> Tensor:  # fmt: skip
    """How many of so many draws answer each point wrongly and do not reject it, int64 [N].

    The draws are a function of seed, example and look alone: the generators are seeded anew for each row, which passes through
    the model by itself. So it does not matter which examples are asked together, whoever asks again gets the same draws, and
    those of two examples are independent whatever the model shares within a batch.

    Args:
        model, x, y, seed, reject: see ``confirm``.
        ids: number of each example, int64 [N].
        looks: which look at its example each row is; 0 for a look that confirms nothing, int64 [N].
        draws: how many.
    """
    wrong = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for row, (look, example) in enumerate(zip(looks.tolist(), ids.tolist(), strict=True)):
        point = x[row : row + 1]
        with untouched(model, streams.text_key(f"{seed} fresh {look} {example}") % (1 << 62)), torch.no_grad():
            logits = torch.cat([classify(model, point) for _ in range(draws)])
        goal = Goal.leave(y[row : row + 1].expand(draws), reject=rejection(model, logits.shape[1], reject))
        wrong[row] = (goal.margin(logits) > rounding(logits)).sum()
    return wrong
