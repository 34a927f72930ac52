"""When a point counts as breaking a model with randomness of its own: an exact test on draws that had no part in its choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
"""So many times as many draws as the threat names confirm a point at most, and at least so many: fewer would miss breaks near one
half."""
EARLY, HOPELESS = 5, 0.25
"""After one in so many of these draws a point is through that is clearly broken by then, or wrong in at most that share of them:
one that is wrong in 63% of its draws would be so given up in one of two thousand tries."""


def level(look: int) -> float:
    """Error rate of the k-th look at an example: ``alpha * 6 / (pi k)^2``, which adds up to ``ALPHA`` over all k.

    >>> round(sum(level(k) for k in range(1, 10_000)), 4)
    0.01
    """
    return ALPHA * 6 / (math.pi * look) ** 2


@cache
def needed(draws: int, look: int = 1, ends: int = 2) -> int:
    """The fewest wrong answers at which the exact binomial test rejects 'at most half of the draws are wrong'. A look may end after
    so many numbers of draws, two in ``confirm``, which share its error rate.

    >>> needed(20), needed(100), needed(100, look=10), needed(100, ends=1)
    (17, 65, 71, 63)
    """
    allowed, tail, wrong = level(look) / ends, 0, draws + 1
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

        broken  <=>  P(Binomial(m, 1/2) >= wrong) <= alpha * 3 / (pi k)^2   at m = M / 5 or at m = M = max(5 * draws, 100)

    with alpha = 0.01. A point that is wrong in at most a quarter of the first fifth is given up there. Most points are clear by then.

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

    Cost: 20 forwards of one row per example, or 100 where these leave it open (as many as the threat's ``draws``, or five times
    these, if that is more); of a deterministic model one. One row at a time, as a model may draw once for a whole batch, and the
    errors at two examples must not depend on each other. None of these rows is part of the passes that an attack reports.

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
    return asked(model, x, y, ids, torch.full_like(ids, look), threat, seed, reject).broken


def drawn(threat: Threat) -> int:
    """How many fresh draws confirm a point under a threat, at most."""
    return max(TIMES * threat.draws, LEAST)


@dataclass(frozen=True)
class Asked:
    """Which points break the model, bool [N], and how many of how many draws were wrong, int64 [N] each."""

    broken: Tensor
    wrong: Tensor
    drawn: Tensor


def asked(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, looks: Tensor, threat: Threat, seed: int, reject: int | None = None
) -> Asked:  # fmt: skip
    """What ``confirm`` says, with the counts; ``looks`` [N]: which look at its example each row is. The draws are those of
    ``fresh``, but for where they end."""
    most, none = drawn(threat), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    first, broken, wrong, count = most // EARLY, none.bool(), none.clone(), none.clone()
    for row, (look, example) in enumerate(zip(looks.tolist(), ids.tolist(), strict=True)):
        point, label = x[row : row + 1], y[row : row + 1]
        with untouched(model, _key(seed, look, example)), torch.no_grad():
            times, n = _wrong(model, point, label, first, reject), first
            if HOPELESS * first < times < needed(first, look):
                times, n = times + _wrong(model, point, label, most - first, reject), most
        wrong[row], count[row], broken[row] = times, n, times >= needed(n, look)
    return Asked(broken, wrong, count)


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
        with untouched(model, _key(seed, look, example)), torch.no_grad():
            wrong[row] = _wrong(model, x[row : row + 1], y[row : row + 1], draws, reject)
    return wrong


def _key(seed: int, look: int, example: int) -> int:
    return streams.text_key(f"{seed} fresh {look} {example}") % (1 << 62)


def _wrong(model: nn.Module, point: Tensor, label: Tensor, draws: int, reject: int | None) -> int:
    """How many of so many answers to one point [1, ...] are wrong and no rejection."""
    logits = torch.cat([classify(model, point) for _ in range(draws)])
    goal = Goal.leave(label.expand(draws), reject=rejection(model, logits.shape[1], reject))
    return int((goal.margin(logits) > rounding(logits)).sum())
