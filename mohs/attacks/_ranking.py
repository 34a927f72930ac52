"""Which classes to aim at first: rankings of the classes other than the label, made at the clean inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from mohs.errors import UsageError
from mohs.problem import Problem

Ranking = Callable[[Problem, int], Tensor]
"""``rank(problem, count) -> classes [B, count]``, most promising first; it pays for its looks through the problem."""


def by_logit(problem: Problem, count: int) -> Tensor:
    """Highest logits first, [B, count]: one look.

    Raises:
        UsageError: more classes asked for than there are.
    """
    logits = problem.look(problem.x0).logits
    _enough(logits.shape[1], count)
    return logits.scatter(1, problem.goal.label.unsqueeze(1), -math.inf).argsort(dim=1, descending=True)[:, :count]


def _enough(classes: int, count: int) -> None:
    if count > classes - 1:
        raise UsageError(f"aims={count}, but the model has {classes} classes, so at most {classes - 1} others.")
