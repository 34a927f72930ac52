"""Optimisers and learning-rate schedules as values: what a recipe states; the loop builds torch's objects."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from mohs.errors import UsageError


class Optimiser(Protocol):
    """Settings of an optimiser; ``lr`` is the highest learning rate, which a schedule scales."""

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        ...

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """torch's optimiser with these settings."""
        ...


class Schedule(Protocol):
    """The learning rate as a function of progress alone, so that it needs no state and a resumed run no memory."""

    def factor(self, done: float) -> float:
        """What the highest learning rate is multiplied by after the share ``done`` in [0, 1) of the training."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.lr, self.weight_decay)
        if not 0 <= self.momentum < 1 or (self.nesterov and self.momentum == 0):
            raise UsageError(
                f"momentum was {self.momentum!r} (nesterov={self.nesterov}). Allowed: [0, 1), with nesterov above 0."
            )

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """torch's optimiser with these settings."""
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@dataclass(frozen=True)
class Adam:
    """Adam; with ``weight_decay`` the decoupled form (AdamW)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.lr, self.weight_decay)
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UsageError(f"beta1 and beta2 must lie in [0, 1); got {self.beta1!r} and {self.beta2!r}.")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """torch's optimiser with these settings."""
        return torch.optim.AdamW(parameters, lr=self.lr, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Constant:
    """The same learning rate throughout."""

    def factor(self, done: float) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Steps:
    """Multiply the learning rate by ``by`` at each of the given shares of the training.

    >>> [Steps(at=(0.5, 0.75)).factor(d) for d in (0.0, 0.5, 0.8)]
    [1.0, 0.1, 0.010000000000000002]
    """

    at: tuple[float, ...] = (0.5, 0.75)
    by: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))  # a TOML file gives a list
        if not all(0 < a < 1 for a in self.at) or not self.by > 0:
            raise UsageError(
                f"Steps(at={self.at}, by={self.by}): 'at' holds shares of the training in (0, 1), 'by' is above 0."
            )

    def factor(self, done: float) -> float:
        """``by`` to the number of steps behind us."""
        return self.by ** sum(done >= a for a in self.at)


@dataclass(frozen=True)
class Cosine:
    """Rise linearly over the share ``rise`` of the training, then fall along half a cosine to zero.

    >>> Cosine().factor(0.0), round(Cosine().factor(0.5), 3), Cosine(rise=0.1).factor(0.05)
    (1.0, 0.5, 0.5)
    """

    rise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rise < 1:
            raise UsageError(f"rise is a share of the training in [0, 1); got {self.rise!r}.")

    def factor(self, done: float) -> float:
        """Between 0 and 1."""
        if done < self.rise:
            return done / self.rise
        return 0.5 * (1 + math.cos(math.pi * (done - self.rise) / (1 - self.rise)))


def _check_rate(lr: float, weight_decay: float) -> None:
    if not (lr > 0 and math.isfinite(lr)):
        raise UsageError(f"The learning rate lr must be above 0 and finite; got {lr!r}.")
    if not weight_decay >= 0:
        raise UsageError(f"weight_decay must be >= 0; got {weight_decay!r}.")
