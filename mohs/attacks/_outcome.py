"""What a run of an attack answers, and when its rows are through."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from torch import Tensor


class Stop(Enum):
    """When a row is settled."""

    SUCCESS = "success"
    """At its first confirmed success (evaluation)."""
    BUDGET = "budget"
    """When the budget is spent (loss curves, the smallest change, detectors); the best point is kept."""
    LAST = "last"
    """When the budget is spent (training); the last iterate is kept, and nothing is judged on the way, which saves a forward. One
    restart of an attack whose ``last`` says that its iterate is a point of the region."""


@dataclass
class Outcome:
    """What an attack found, per example.

    ``x`` [N, ...] holds the adversarial example, or the best point inside the region (the clean input where the smallest
    change was asked for and none found). ``size`` is the norm of the change, inf where nothing was found; ``margin`` by how
    many logits the goal is met. ``forwards``, ``backwards`` and ``queries`` count what the rows up to the answering one
    cost, run in sequence; ``spent`` those of all rows, cancelled ones included, and ``restart`` the answering row (-1: none).
    ``error``: the model somewhere answered with logits that are not finite, so that 'not found' says little.
    ``trace`` [N, rows, looks] is the objective at every look where it was asked for (nan: not looked).
    """

    x: Tensor
    success: Tensor
    size: Tensor
    margin: Tensor
    restart: Tensor
    forwards: Tensor
    backwards: Tensor
    queries: Tensor
    spent: int
    batch: int
    error: Tensor
    trace: Tensor | None = None

    def of(self, rows: Tensor) -> Outcome:
        """The outcome of some of the examples: a mask [N] or positions."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        parts |= {name: part[rows] for name, part in parts.items() if isinstance(part, Tensor)}
        return Outcome(**parts)

    def __repr__(self) -> str:
        found = int(self.success.sum())
        middle = f", median size {float(self.size.median()):.4g}" if found * 2 > len(self.success) else ""
        return f"Outcome({found} of {len(self.success)} found{middle}, {self.spent} passes)"
