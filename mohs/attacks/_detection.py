"""The two goals of an attack on a classifier that rejects: other answers of the classes, and no rejection."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mohs.problem import Goal


@dataclass(frozen=True)
class Half:
    """A margin [B], positive where this half of the goal is met, and its derivative by the logits [B, K + 1]."""

    value: Tensor
    cotangent: Tensor


def two_goals(logits: Tensor, goal: Goal) -> tuple[Half, Half | None]:
    """The classes' margin, as if nothing were rejected, and that of the classes over the rejection; None where none is in the way.

    >>> classes, detector = two_goals(torch.tensor([[3.0, 1.0, 4.0]]), Goal.leave(torch.tensor([0]), reject=2))
    >>> classes.value.tolist(), classes.cotangent.tolist()
    ([-2.0], [[-1.0, 1.0, 0.0]])
    >>> detector.value.tolist(), detector.cotangent.tolist()
    ([-1.0], [[1.0, 0.0, -1.0]])
    """
    reject = goal.reject
    if reject is None:
        return _pair(logits, *goal.contest(logits)), None
    hidden = logits.detach().clone()
    asked = goal.reach & (goal.label == reject)  # to be rejected is the goal: then it is a class like the others
    hidden[:, reject] = torch.where(asked, hidden[:, reject], -math.inf)
    bare = Goal(goal.label, goal.reach, goal.aim)
    classes = _pair(logits, *bare.contest(hidden))
    winner = torch.where(goal.reach, goal.label, hidden.argmax(1))
    detector = _pair(logits, winner, torch.full_like(winner, reject))
    # nothing is in the way of a row that is to be rejected, and 0 stands for that
    free = asked.unsqueeze(1)
    value = torch.where(asked, math.inf, detector.value)
    return classes, Half(value, torch.where(free, classes.cotangent, detector.cotangent))


def _pair(logits: Tensor, up: Tensor, down: Tensor) -> Half:
    up, down = up.unsqueeze(1), down.unsqueeze(1)
    cotangent = torch.zeros_like(logits).scatter_(1, up, 1.0).scatter_(1, down, -1.0)
    return Half((logits.gather(1, up) - logits.gather(1, down)).squeeze(1), cotangent)
