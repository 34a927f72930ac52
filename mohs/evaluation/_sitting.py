"""The sitting of an exam: a plan's stages over the planted points, as an evaluation runs them on its control subset."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mohs.attacks import Attack, attack, by_distance, by_logit
from mohs.evaluation._needle import Hidden
from mohs.evaluation.confirmation import confirm
from mohs.evaluation.plans import PlanStep
from mohs.threat import Threat

GuideFactory = Callable[[nn.Module], nn.Module | None]
"""Makes the guide of a classifier; the exam's modules have the names they have in the model under test."""
Progress = Callable[[str, int, int], None]
"""Called with (stage, examples done, of how many)."""


@dataclass
class Room:
    """One example under examination."""

    example: int
    hidden: Hidden
    best: Tensor
    margin: float = -math.inf
    broken: bool = False
    tried: bool = False
    confirmations: int = 0


@dataclass
class Sitting:
    """The attack's stages over all rooms, in their order."""

    threat: Threat
    rooms: list[Room]
    guide: GuideFactory | None
    average: int | None
    seed: int
    progress: Progress | None
    spent: int = 0

    def stage(self, step: PlanStep, method: Attack) -> None:
        """One attack on all rooms not yet broken, whatever its share: of so few, shares would leave single ones."""
        for room in [r for r in self.rooms if not r.broken]:
            self._try(room, step, method)
        if self.progress is not None:
            self.progress(step.label, sum(r.broken for r in self.rooms), len(self.rooms))

    def _try(self, room: Room, step: PlanStep, method: Attack) -> None:
        model, x = room.hidden.model, room.hidden.x
        warm = step.start == "best" and room.tried and self.threat.queries is None
        rank: Any = by_distance if step.rank == "distance" else by_logit
        found = attack(
            method, model, x, torch.zeros(1, dtype=torch.int64, device=x.device), self.threat, restarts=step.restarts,
            aims=min(step.aims, 1), rank=rank, start=room.best if warm else None, seed=self.seed,
            guide=None if self.guide is None else self.guide(model), average=self.average,
        )  # fmt: skip
        self.spent += found.spent
        room.tried, room.broken = True, bool(found.success)
        if room.broken and self.threat.draws:  # as an evaluation asks again what luck may have found
            room.confirmations += 1
            label = torch.zeros(1, dtype=torch.int64, device=x.device)
            again = confirm(model, found.x, label, self.threat, seed=self.seed, look=room.confirmations)
            room.broken = bool(again)
        if float(found.margin) > room.margin:
            room.best, room.margin = found.x, float(found.margin)
