"""Goal, Findings and Problem: what is asked of each row, what has been found, and everything an attack may touch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from mohs._rows import Rows
from mohs.threat import Threat

if TYPE_CHECKING:
    from mohs.look import Look, View
    from mohs.objectives import Objective
    from mohs.target import Target

NO_AIM = -1


@dataclass
class Goal(Rows):
    """What the attacker wants of each row: leave ``label``, or reach it; the only place with a sign.

    Args:
        label: the class to leave or to reach, int64 [B].
        reach: which of the two, bool [B].
        aim: a class to move towards while the goal stays 'leave' (-1: none), int64 [B].
        reject: index of the logit by which a model rejects an input, or None. A rejected input is no success
            for the attacker: to leave a class, another class must win over the rejection too.
        confidence: by how many logits the answer must win to count (Carlini and Wagner's kappa).
    """

    label: Tensor
    reach: Tensor
    aim: Tensor
    reject: int | None = None
    confidence: float = 0.0

    @classmethod
    def leave(
        cls, label: Tensor, aim: Tensor | None = None, reject: int | None = None, confidence: float = 0.0
    ) -> Self:
        """Any answer but the label (untargeted)."""
        aim = torch.full_like(label, NO_AIM) if aim is None else aim
        return cls(label, torch.zeros_like(label, dtype=torch.bool), aim, reject, confidence)

    @classmethod
    def attain(cls, label: Tensor, reject: int | None = None, confidence: float = 0.0) -> Self:
        """Exactly the label (targeted); 'make it reject' is to attain the reject logit."""
        aim = torch.full_like(label, NO_AIM)
        return cls(label, torch.ones_like(label, dtype=torch.bool), aim, reject, confidence)

    def margin(self, logits: Tensor) -> Tensor:
        """By how much the goal is met, [B] in logits: positive is success, and larger is more; nan logits give -inf.

        The ``confidence`` asked for is subtracted.

        >>> goal = Goal.leave(torch.tensor([0, 0]))
        >>> goal.margin(torch.tensor([[3.0, 1.0, 2.0], [1.0, 4.0, 2.0]])).tolist()
        [-1.0, 3.0]
        """
        own = self.label.unsqueeze(1)
        mine = logits.gather(1, own)
        rest = logits.scatter(1, own, -math.inf)
        if self.reject is not None:
            # leaving: the rejection stands beside the label, never among the winners (unless it is the label itself)
            rejected = logits[:, self.reject : self.reject + 1]
            guard = torch.where(self.reach.unsqueeze(1), mine, torch.maximum(mine, rejected))
            hidden = rest.clone()
            hidden[:, self.reject] = -math.inf
            rest = torch.where(self.reach.unsqueeze(1), rest, hidden)
            mine = guard
        lead = rest.amax(1) - mine.squeeze(1)
        lead = torch.where(self.reach, -lead, lead).nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        return lead - self.confidence if self.confidence else lead

    def reached(self, answer: Tensor) -> Tensor:
        """Do answers alone, classes [B], meet the goal? All that a label tells: neither confidence nor aim; -1 is no answer.

        >>> Goal.leave(torch.tensor([0, 0, 0]), reject=2).reached(torch.tensor([0, 1, 2])).tolist()
        [False, True, False]
        """
        left = (answer != self.label) & (answer >= 0)
        if self.reject is not None:
            left &= answer != self.reject
        return torch.where(self.reach, answer == self.label, left)

    @staticmethod
    def decide(logits: Tensor) -> Tensor:
        """The model's answer, [B]."""
        return logits.argmax(1)

    def contest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(the class to raise, the class to lower), [B] each: the pair the logit margin compares."""
        rest = logits.scatter(1, self.label.unsqueeze(1), -math.inf)
        if self.reject is not None:
            hidden = rest.clone()
            hidden[:, self.reject] = -math.inf
            rest = torch.where(self.reach.unsqueeze(1), rest, hidden)
        rival = rest.argmax(1)
        rival = torch.where(self.aim >= 0, self.aim, rival)
        return torch.where(self.reach, self.label, rival), torch.where(self.reach, rival, self.guard(logits))

    def guard(self, logits: Tensor) -> Tensor:
        """What another class has to beat for the label to be left, [B]: the label, or the rejection where its logit is higher."""
        if self.reject is None:
            return self.label
        mine = logits.gather(1, self.label.unsqueeze(1)).squeeze(1)
        return torch.where(logits[:, self.reject] > mine, self.reject, self.label)

    def contending(self, logits: Tensor) -> Tensor:
        """Logits [B, K] without the lower one of label and rejection, where a label is to be left.

        Whoever beats the higher one beats both; to raise or lower the other changes nothing, but a probability that it shares in
        would say otherwise.

        >>> goal = Goal.leave(torch.tensor([0, 0]), reject=2)
        >>> goal.contending(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 4.0]])).tolist()
        [[3.0, 1.0, -inf], [-inf, 1.0, 4.0]]
        """
        if self.reject is None:
            return logits
        lower = self.label + self.reject - self.guard(logits)
        whole = self.reach | (self.label == self.reject)
        return torch.where(whole.unsqueeze(1), logits, logits.scatter(1, lower.unsqueeze(1), -math.inf))

    @cached_property
    def pivot(self) -> Tensor:
        """The class whose probability a likelihood objective changes: aim or label, [B]."""
        return torch.where(self.aim >= 0, self.aim, self.label)

    @cached_property
    def sign(self) -> Tensor:
        """+1 where the pivot is to lose probability, -1 where it is to gain, float [B]."""
        return 1.0 - 2.0 * (self.reach | (self.aim >= 0)).float()


@dataclass
class Findings(Rows):
    """The best point of each row and what it cost; written by the target alone.

    ``x`` is the best point (the clean input at first), ``met`` whether it meets the goal inside region and box (of a random
    model: in most fresh draws), ``clear`` whether a point did so beyond doubt, which ends a row, ``score`` what 'best' means: the
    objective, or minus the size where the smallest change is asked for (of a random model, among points that meet the goal, the
    mean margin of the fresh draws). ``last`` is the objective at
    the latest look. A ``settled`` row is frozen: nothing is recorded or counted any more. ``error``: the model once answered
    this row with logits that are not finite.
    """

    x: Tensor
    met: Tensor
    clear: Tensor
    score: Tensor
    margin: Tensor
    last: Tensor
    settled: Tensor
    forwards: Tensor
    backwards: Tensor
    queries: Tensor
    error: Tensor

    @classmethod
    def none(cls, x0: Tensor) -> Self:
        """Nothing found, nothing spent."""
        rows = len(x0)
        low = x0.new_full((rows,), -math.inf)
        flag = torch.zeros(rows, dtype=torch.bool, device=x0.device)
        count = torch.zeros(rows, dtype=torch.int64, device=x0.device)
        return cls(
            x0.clone(),
            flag,
            flag.clone(),
            low,
            low.clone(),
            low.clone(),
            flag.clone(),
            count,
            count.clone(),
            count.clone(),
            flag.clone(),
        )


@dataclass
class Problem(Rows):
    """Everything an attack may see of its rows: clean inputs, radii, goals, random streams, and the door to the model.

    Args:
        target: the only door to the model.
        threat: region, box and access (the radius of a row is ``eps``, not the region's).
        x0: clean inputs [B, ...].
        eps: radius per row [B]; infinite where the smallest change is asked for.
        goal: what to achieve.
        key: random stream of each row, int64 [B].
        example, number: which example, and which of its rows this is, int64 [B].
        restart: which of the tries at the example (and at the aim, if there are aims), int64 [B].
        found: the target's notes.
        warm: where the caller wants the rows to begin [B, ...], inside region and box (inside the box alone for an attack that
            comes from ``outside``); None: the attack decides.
    """

    target: Target
    threat: Threat
    x0: Tensor
    eps: Tensor
    goal: Goal
    key: Tensor
    example: Tensor
    number: Tensor
    restart: Tensor
    found: Findings
    warm: Tensor | None = None

    def linearize(self, x: Tensor, objective: Objective | None = None) -> View:
        """Look at ``x`` with gradients; see ``Target.linearize``."""
        return self.target.linearize(self, x, objective)

    def gradient(self, x: Tensor, objective: Objective) -> Tensor:
        """Look at ``x`` and return the gradient of the objective there, [B, ...]: one forward, one backward."""
        return self.target.gradient(self, x, objective)

    def look(self, x: Tensor, objective: Objective | None = None) -> Look:
        """Look at ``x`` without gradients; see ``Target.look``."""
        return self.target.look(self, x, objective)

    def start(self) -> Tensor:
        """Where a randomly started attack begins: the caller's points, or a random one of each row's region and box."""
        if self.warm is not None:
            return self.warm.clone()
        return self.threat.region.start(self.x0, self.eps, self.threat.box, self.key)

    def begin(self) -> Tensor:
        """Where any other attack begins: the caller's points, or the clean inputs."""
        return (self.x0 if self.warm is None else self.warm).clone()

    def advance(self, x: Tensor, g: Tensor, size: Tensor) -> Tensor:
        """One ascent step of length ``size`` [B] along ``g``, and back into region and box."""
        return self.threat.region.advance(x, g, size, self.x0, self.eps, self.threat.box)

    def project(self, x: Tensor) -> Tensor:
        """Back into region and box."""
        return self.threat.region.project(x, self.x0, self.eps, self.threat.box)
